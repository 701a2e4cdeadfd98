"""The paper's model made of torch's own layers, as users of torch.nn.Transformer have it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import Transformer, TransformerConfig
from fastattn.nmt.transformer import Positions


class TorchTransformer(nn.Module):
    """torch.nn.Transformer with the paper's embeddings, positions and shared matrix, on padded ids.

    Dropout is where the paper has it: not on attention weights, and not inside the feed-forward layers.

    Args:
        config: of a post-norm model without a table of target languages.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_id)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        self.positions = Positions(config)
        self.dropout = nn.Dropout(config.dropout)
        sizes = config.d_model, config.num_heads, config.d_ff, config.dropout
        eps = config.layer_norm_eps
        encoder = nn.TransformerEncoderLayer(*sizes, layer_norm_eps=eps, batch_first=True)
        decoder = nn.TransformerDecoderLayer(*sizes, layer_norm_eps=eps, batch_first=True)
        for layer in (encoder, decoder):
            layer.add_module("dropout", nn.Identity())
            layer.self_attn.dropout = 0.0
        decoder.multihead_attn.dropout = 0.0
        self.encoder = nn.TransformerEncoder(encoder, config.num_encoder_layers)
        self.decoder = nn.TransformerDecoder(decoder, config.num_decoder_layers)

    def hidden(self, source: Tensor, target: Tensor) -> Tensor:
        """Decoder states (batch, length, d_model) of ids (batch, length) with padding on the right."""
        return self.decode(F.pad(target, (1, 0), value=self.config.bos_id)[:, :-1], self.encode(source), source)

    def encode(self, source: Tensor) -> Tensor:
        """The encoder's output (batch, length, d_model)."""
        return self.encoder(self._embed(source), src_key_padding_mask=source == self.config.pad_id)

    def decode(self, tokens: Tensor, memory: Tensor, source: Tensor) -> Tensor:
        """Decoder states of decoder inputs that are already shifted."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device, dtype=torch.bool)
        padding = source == self.config.pad_id
        x = self._embed(tokens)
        return self.decoder(x, memory, mask, memory_key_padding_mask=padding, tgt_is_causal=True)

    def output_weight(self) -> Tensor:
        """The shared matrix (vocab_size, d_model)."""
        return self.embedding.weight

    def _embed(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) * self.config.d_model**0.5 + self.positions(positions, tokens.shape[1])
        return self.dropout(x)

    def copy_from(self, model: Transformer) -> TorchTransformer:
        """Takes the parameters of fastattn's model of the same configuration; returns itself."""
        self.embedding.load_state_dict(model.embedding.state_dict())
        for theirs, ours in zip(
            [*self.encoder.layers, *self.decoder.layers], [*model.encoder, *model.decoder], strict=True
        ):
            theirs.self_attn.load_state_dict(ours.self_attention.state_dict())
            if hasattr(ours, "cross_attention"):
                theirs.multihead_attn.load_state_dict(ours.cross_attention.state_dict())
            theirs.linear1.load_state_dict(ours.feed_forward[0].state_dict())
            theirs.linear2.load_state_dict(ours.feed_forward[2].state_dict())
            for i, residual in enumerate(ours.residuals, 1):
                getattr(theirs, f"norm{i}").load_state_dict(residual.norm.state_dict())
        return self
