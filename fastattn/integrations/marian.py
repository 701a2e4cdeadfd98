"""A Transformer as a folder that Hugging Face's `MarianMTModel.from_pretrained` reads, and back.

Marian's class is the paper's model with two differences. Its positions hold all sines, then all cosines, where the
paper interleaves them: the features of the residual stream are written in that order, which every matrix that reads or
writes the stream undoes. And its LayerNorm eps is always 1e-5, the paper's authors' 1e-6: outputs differ by about that
much, unless the eps of the loaded model's LayerNorms is set. A vector for the target language becomes part of a source
embedding of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nmt.config import TransformerConfig
from ..nmt.transformer import Transformer
from .safetensors import filled, read_tensors

_MARIAN_EPS = 1e-5

# Names of the feed-forward layers and LayerNorms of a layer: ours, and Marian's.
_ENCODER_LAYER = {
    "feed_forward.0": "fc1",
    "feed_forward.2": "fc2",
    "residuals.0.norm": "self_attn_layer_norm",
    "residuals.1.norm": "final_layer_norm",
}
_DECODER_LAYER = {
    "feed_forward.0": "fc1",
    "feed_forward.2": "fc2",
    "residuals.0.norm": "self_attn_layer_norm",
    "residuals.1.norm": "encoder_attn_layer_norm",
    "residuals.2.norm": "final_layer_norm",
}


def save_marian(
    model: Transformer,
    folder: str | PathLike[str],
    target_space: int = 0,
    sentencepiece_model: str | PathLike[str] | None = None,
) -> None:
    """Write a model, and its tokenizer if given, for `MarianMTModel` and `MarianTokenizer`.

    The configuration asks for the paper's search, beam 4, with Marian's penalty |Y|^0.6, which is not the paper's.

    Args:
        model: post-norm with sinusoidal positions and d_model // num_heads features per head.
        folder: made if it does not exist.
        target_space: row of the table of target languages that the folder translates into.
        sentencepiece_model: file whose ids, padding and end of sentence included, are those of the model.

    Raises:
        NotImplementedError: an architecture that Marian's class does not have; the message says which part.
        ValueError: a target space outside the table, or a vocabulary of another size.
    """
    _check_architecture(model.config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if sentencepiece_model is not None:
        _save_tokenizer(model.config, Path(sentencepiece_model), folder)
    _save_tensors(_marian_tensors(model, target_space), folder / "model.safetensors")
    _write_json(folder / "config.json", _marian_config(model.config))
    _write_json(folder / "generation_config.json", _generation_config(model.config))


def load_marian(folder: str | PathLike[str]) -> Transformer:
    """The Transformer of a Marian folder with `model.safetensors`, on the CPU, in training mode.

    Raises:
        NotImplementedError: an architecture that `Transformer` does not have; the message says which part.
        ValueError: parameters that are not those of `config.json`.
    """
    folder = Path(folder)
    marian = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = read_tensors(folder / "model.safetensors")
    is_shared = marian.get("share_encoder_decoder_embeddings", True)
    _check_marian(marian, tensors)
    model = Transformer(_config_of(marian, num_target_spaces=0 if is_shared else 1))
    try:
        state = _state_of(model, tensors, is_shared)
    except NotImplementedError:
        raise
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"{folder}: config.json does not describe model.safetensors ({error})") from error
    return filled(model, state, folder)


# ---- parameters ----


def _sines_first(d_model: int) -> Tensor:
    """Indices that put the even features first, then the odd ones."""
    return torch.arange(d_model).view(-1, 2).t().flatten()


def _reorder(tensor: Tensor, axes: tuple[int, ...], order: Tensor) -> Tensor:
    for axis in axes:
        tensor = tensor.index_select(axis, order)
    return tensor


def _names(model: Transformer) -> Iterator[tuple[str, list[str], tuple[int, ...]]]:
    """Every parameter but the embeddings: our name, Marian's names of its parts, the axes along the residual stream."""
    stacks = (
        ("encoder", model.config.num_encoder_layers, _ENCODER_LAYER, {"self_attention": "self_attn"}),
        ("decoder", model.config.num_decoder_layers, _DECODER_LAYER,
         {"self_attention": "self_attn", "cross_attention": "encoder_attn"}),
    )  # fmt: skip
    for stack, layers, renamed, attentions in stacks:
        for layer in range(layers):
            ours, theirs = f"{stack}.{layer}", f"model.{stack}.layers.{layer}"
            for name, other in renamed.items():
                # fc1 reads the stream, fc2 and the LayerNorms write it.
                weight_axes, bias_axes = ((1,), ()) if other == "fc1" else ((0,), (0,))
                yield f"{ours}.{name}.weight", [f"{theirs}.{other}.weight"], weight_axes
                yield f"{ours}.{name}.bias", [f"{theirs}.{other}.bias"], bias_axes
            for name, other in attentions.items():
                for kind, axes in (("weight", (1,)), ("bias", ())):
                    projections = [f"{theirs}.{other}.{letter}_proj.{kind}" for letter in "qkv"]
                    yield f"{ours}.{name}.in_proj_{kind}", projections, axes
                    yield f"{ours}.{name}.out_proj.{kind}", [f"{theirs}.{other}.out_proj.{kind}"], (0,)


def _marian_tensors(model: Transformer, target_space: int) -> dict[str, Tensor]:
    """Marian's state: everything but what it shares or computes itself."""
    config, state = model.config, model.state_dict()
    spaces = max(1, config.num_target_spaces)
    if not 0 <= target_space < spaces:
        raise ValueError(f"target_space: must lie in [0, {spaces}), got {target_space}")
    order = _sines_first(config.d_model).to(model.embedding.weight.device)
    tensors: dict[str, Tensor] = {}
    for ours, theirs, axes in _names(model):
        parts = _reorder(state[ours], axes, order).chunk(len(theirs))
        tensors |= dict(zip(theirs, parts, strict=True))
    embedding = state["embedding.weight"][:, order]
    if model.target_spaces is None:
        tensors["model.shared.weight"] = embedding
    else:
        space = state["target_spaces.weight"][target_space, order]
        tensors["model.encoder.embed_tokens.weight"] = embedding + space / config.d_model**0.5
        tensors["model.decoder.embed_tokens.weight"] = embedding
    tensors["final_logits_bias"] = embedding.new_zeros(1, config.vocab_size)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _state_of(model: Transformer, tensors: dict[str, Tensor], is_shared: bool) -> dict[str, Tensor]:
    """The state of `Transformer`. A source embedding of its own, less the target's, is the target language's vector."""
    order = _sines_first(model.config.d_model).argsort()
    state = {
        ours: _reorder(torch.cat([tensors[name] for name in theirs]), axes, order)
        for ours, theirs, axes in _names(model)
    }
    if is_shared:
        return {**state, "embedding.weight": tensors["model.shared.weight"][:, order]}
    source, target = (tensors[f"model.{stack}.embed_tokens.weight"][:, order] for stack in ("encoder", "decoder"))
    space = (source - target).double().mean(0, keepdim=True)
    if not torch.allclose(source.double(), target + space, rtol=0, atol=1e-5 * float(source.abs().max())):
        raise NotImplementedError("Marian: source and target embeddings differ by more than one vector for all ids")
    state["target_spaces.weight"] = (space * model.config.d_model**0.5).to(target.dtype)
    return {**state, "embedding.weight": target}


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


# ---- configuration ----


def _check_architecture(config: TransformerConfig) -> None:
    default = config.d_model // config.num_heads
    missing = {
        f"norm {config.norm!r}: Marian's class has post-norm only": config.norm == "post",
        f"positions {config.positions!r}: Marian's are sinusoidal": config.positions == "sinusoidal",
        f"head_dim {config.head_dim}: Marian's is d_model / num_heads, {default}": config.head_dim in (None, default),
        f"v_head_dim {config.v_head_dim}: Marian's is {default}": config.v_head_dim in (None, default),
        f"d_model {config.d_model}: Marian's must be even": config.d_model % 2 == 0,
    }
    reasons = [reason for reason, holds in missing.items() if not holds]
    if reasons:
        raise NotImplementedError("Marian: " + "; ".join(reasons))


def _marian_config(config: TransformerConfig) -> dict[str, Any]:
    is_shared = config.num_target_spaces == 0
    sizes: dict[str, int] = {}
    for side, layers in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        sizes |= {f"{side}_layers": layers, f"{side}_ffn_dim": config.d_ff}
        sizes[f"{side}_attention_heads"] = config.num_heads
    return {
        "model_type": "marian",
        "architectures": ["MarianMTModel"],
        "vocab_size": config.vocab_size,
        "decoder_vocab_size": config.vocab_size,
        "share_encoder_decoder_embeddings": is_shared,
        "tie_word_embeddings": True,
        "d_model": config.d_model,
        **sizes,
        "activation_function": "relu",
        "scale_embedding": True,
        "dropout": config.dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "max_position_embeddings": config.max_len,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.eos_id,
        "forced_eos_token_id": config.eos_id,
        "bos_token_id": None,
        "decoder_start_token_id": config.bos_id,
        "layer_norm_eps": config.layer_norm_eps,  # not read by Marian's class: kept for load_marian
    }


def _generation_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        "num_beams": 4,
        "length_penalty": 0.6,
        "max_length": min(512, config.max_len),
        "pad_token_id": config.pad_id,
        "eos_token_id": config.eos_id,
        "forced_eos_token_id": config.eos_id,
        "decoder_start_token_id": config.bos_id,
        "bad_words_ids": [[config.pad_id]],
    }


def _check_marian(marian: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    bias = tensors.get("final_logits_bias")
    activation = marian.get("activation_function")
    is_symmetric = all(
        marian[f"encoder_{name}"] == marian[f"decoder_{name}"] for name in ("ffn_dim", "attention_heads")
    )
    missing = {
        f"model_type {marian.get('model_type')!r} is not marian": marian.get("model_type") == "marian",
        f"activation_function {activation!r}: ours is relu": activation == "relu",
        "embeddings that are not scaled by sqrt(d_model)": bool(marian.get("scale_embedding")),
        "encoder and decoder of different widths or heads": is_symmetric,
        "source and target vocabularies of their own": marian.get("decoder_vocab_size") in (None, marian["vocab_size"]),
        "a bias of the logits": bias is None or not bias.any(),
        "a decoder that starts with padding": marian.get("decoder_start_token_id") != marian.get("pad_token_id"),
    }
    reasons = [reason for reason, holds in missing.items() if not holds]
    if reasons:
        raise NotImplementedError("Marian: " + "; ".join(reasons))


def _config_of(marian: dict[str, Any], num_target_spaces: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=marian["vocab_size"],
        d_model=marian["d_model"],
        d_ff=marian["encoder_ffn_dim"],
        num_heads=marian["encoder_attention_heads"],
        num_encoder_layers=marian["encoder_layers"],
        num_decoder_layers=marian["decoder_layers"],
        dropout=marian["dropout"],
        max_len=marian["max_position_embeddings"],
        pad_id=marian["pad_token_id"],
        bos_id=marian["decoder_start_token_id"],
        eos_id=marian["eos_token_id"],
        num_target_spaces=num_target_spaces,
        layer_norm_eps=marian.get("layer_norm_eps", _MARIAN_EPS),
    )


# ---- tokenizer ----


def _save_tokenizer(config: TransformerConfig, sentencepiece_model: Path, folder: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(sentencepiece_model))
    ids = {"pad_id": processor.pad_id(), "eos_id": processor.eos_id(), "vocab_size": processor.vocab_size()}
    for name, value in ids.items():
        if value != getattr(config, name):
            rule = f"must be the model's {getattr(config, name)}"
            raise ValueError(f"sentencepiece_model: {name} {rule}, got {value} in {sentencepiece_model}")
    for side in ("source", "target"):
        shutil.copyfile(sentencepiece_model, folder / f"{side}.spm")
    pieces = {processor.id_to_piece(index): index for index in range(processor.vocab_size())}
    _write_json(folder / "vocab.json", pieces)
    special = {"unk": processor.unk_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
    names = {f"{name}_token": processor.id_to_piece(index) for name, index in special.items()}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "MarianTokenizer", **names})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
