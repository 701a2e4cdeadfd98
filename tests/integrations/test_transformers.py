"""Hugging Face's models with attn_implementation="fastattn": outputs, gradients and tokens are eager's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import masking_utils as masking

from fastattn import functional
from fastattn.integrations import transformers as integration
from tests.support.tolerance import assert_model_close

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **SIZES}
GROUPS: dict[str, Any] = {"num_key_value_heads": 2}
BART: dict[str, Any] = {
    **{"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 32},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
    },
}
T5: dict[str, Any] = {
    **{"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
    **{"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"},  # of ReLU one flip in bfloat16 is a gradient
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE = {"image_size": 32, "patch_size": 8}
WHISPER = BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
GPT_OSS = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}
GPT_OSS["layer_types"] = LAYERS = ["sliding_attention", "full_attention"]
GEMMA = {"head_dim": 8, "sliding_window": 4, "layer_types": LAYERS}
GEMMA4 = GEMMA | {
    **{"num_hidden_layers": 4, "layer_types": LAYERS + LAYERS, "num_kv_shared_layers": 2},
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64},
}
DEEPSEEK = {
    **{"num_key_value_heads": 4, "mlp_layer_types": ["dense", "dense"], "first_k_dense_replace": 2},
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"index_topk": 3, "index_head_dim": 8, "index_n_heads": 2},
}

CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", TEXT | GROUPS),
    "Mistral": ("Mistral", TEXT | GROUPS | {"sliding_window": 4}),
    "Gemma2": ("Gemma2", TEXT | GROUPS | GEMMA | {"attn_logit_softcapping": 0.5}),
    "Gemma3": ("Gemma3Text", TEXT | GROUPS | GEMMA),
    "GptOss": ("GptOss", TEXT | GROUPS | GPT_OSS),
}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertModel", "Bert", TEXT | NO_DROPOUT),
    "ViT": ("ViTModel", "ViT", SIZES | NO_DROPOUT | IMAGE),
    "CLIP": ("CLIPVisionModel", "CLIPVision", SIZES | IMAGE),
    "Marian": ("MarianMTModel", "Marian", BART),
    "BART": ("BartForConditionalGeneration", "Bart", BART),
    "Whisper": ("WhisperForConditionalGeneration", "Whisper", WHISPER),
    "T5": ("T5ForConditionalGeneration", "T5", T5),
}
# More of each kind, with the sizes that their configurations have other names for.
MORE_CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, TEXT | GROUPS)
    for name in ("Qwen2", "Qwen3", "Phi3", "Olmo2", "StableLm", "Granite", "Cohere", "SmolLM3")
}
MORE_CAUSAL |= {
    "Gemma": ("Gemma", TEXT | GROUPS | {"head_dim": 8}),
    "GPTNeoX": ("GPTNeoX", TEXT),
    "Gemma4": ("Gemma4Text", TEXT | GROUPS | GEMMA4),
    "DeepseekV32": ("DeepseekV32", TEXT | DEEPSEEK),
    "Starcoder2": ("Starcoder2", TEXT | GROUPS | {"sliding_window": 4}),
    "OPT": ("OPT", TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 32, "dropout": 0.0}),
}
MORE_OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "RoBERTa": ("RobertaModel", "Roberta", TEXT | NO_DROPOUT),
    "Electra": ("ElectraModel", "Electra", TEXT | NO_DROPOUT | {"embedding_size": 32}),
    "DINOv2": ("Dinov2Model", "Dinov2", SIZES | NO_DROPOUT | IMAGE),
    "SigLIP": ("SiglipVisionModel", "SiglipVision", SIZES | IMAGE),
    "mBART": ("MBartForConditionalGeneration", "MBart", BART),
    "Pegasus": ("PegasusForConditionalGeneration", "Pegasus", BART),
}
IDS = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(0))
LAYER = nn.Module()
LENGTHS = torch.tensor([11, 8])
KEPT = torch.arange(11)[None] < LENGTHS[:, None]


@pytest.fixture(autouse=True)
def registered() -> None:
    integration.register()
    integration.register()


def made(name: str, factor: float = 4.0) -> nn.Module:
    torch.manual_seed(0)
    if name in CAUSAL | MORE_CAUSAL:
        stem, sizes = (CAUSAL | MORE_CAUSAL)[name]
        cls, config = stem.removesuffix("Text") + "ForCausalLM", stem
    else:
        cls, config, sizes = (OTHERS | MORE_OTHERS)[name]
    model = getattr(hf, cls)(getattr(hf, f"{config}Config")(**sizes)).eval()
    if name == "GptOss":
        model.set_experts_implementation("eager")  # the other products of experts have no float64
    with torch.no_grad():  # weights as they are drawn give scores near 0, which every mistake of a scale survives
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
            elif "sinks" in dict(model.named_parameters()):
                parameter.normal_()
    return model


def inputs(name: str, kept: Tensor = KEPT) -> dict[str, Tensor]:
    padded = {"input_ids": IDS, "attention_mask": kept.long()}
    generator = torch.Generator().manual_seed(1)
    if name in ("ViT", "CLIP", "DINOv2", "SigLIP"):
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    if name == "Whisper":
        return {"input_features": torch.randn(2, 8, 32, generator=generator), "decoder_input_ids": IDS[:, :7]}
    if name in ("Marian", "BART", "T5", "mBART", "Pegasus"):
        return padded | {"decoder_input_ids": IDS[:, :7]}
    return padded


def output_and_gradients(
    model: Any, implementation: str, dtype: torch.dtype, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(implementation)
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
    result = model(**batch)
    out = result.logits if hasattr(result, "logits") else result.last_hidden_state
    if "attention_mask" in batch and "decoder_input_ids" not in batch:  # what stands at padding is nobody's
        out = out * batch["attention_mask"][..., None].to(dtype)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    out.backward(dout)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach()} | gradients


@pytest.fixture
def calls() -> list[dict[str, Any]]:
    """The arguments of the calls of the implementation "counted", which is fastattn's."""
    calls: list[dict[str, Any]] = []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return integration.attention_forward(*args, **kwargs)

    hf.AttentionInterface.register("counted", count)
    hf.AttentionMaskInterface.register("counted", hf.AttentionMaskInterface()[integration.NAME])
    return calls


@pytest.mark.parametrize("name", [*CAUSAL, *OTHERS, *MORE_CAUSAL, *MORE_OTHERS])
def test_outputs_and_gradients_are_eagers(name: str, calls: list[dict[str, Any]]) -> None:
    model, batch = made(name), inputs(name)
    oracle = output_and_gradients(model, "eager", torch.float64, batch)
    eager = output_and_gradients(model, "eager", torch.float32, batch)
    assert calls == []
    actual = output_and_gradients(model, "counted", torch.float32, batch)
    assert len(calls) == (
        6 if "decoder_input_ids" in batch or name == "Whisper" else 4 if name == "Gemma4" else 2
    )  # encoder, decoder, across
    assert_model_close(actual, oracle, eager)


@pytest.mark.parametrize("implementation", ["dynamic", "static", "beams"])
@pytest.mark.parametrize("name", [*CAUSAL, "Marian", "BART", "Whisper", "T5", *MORE_CAUSAL, "mBART"])
def test_tokens_are_eagers(name: str, implementation: str, calls: list[dict[str, Any]]) -> None:
    model: Any = made(name)  # not in float64, whose least score is -inf in the float32 of softmaxes: NaN
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"dynamic": {}, "static": {"cache_implementation": "static"}, "beams": {"num_beams": 3}}[implementation]
    batch = {n: x for n, x in inputs(name, KEPT.flip(1)).items() if n != "decoder_input_ids"}
    tokens = []
    for attention in ("eager", "counted"):
        model.set_attn_implementation(attention)
        tokens.append(model.generate(**batch, **options, disable_compile=True))
    assert len(calls) >= 12
    assert torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Mistral", "BERT", "T5"])
def test_half_types_are_as_close_as_eager_is(name: str, dtype: torch.dtype) -> None:
    # With larger weights T5, which does not scale its scores, has no gradient in bfloat16: eager's is off by its norm.
    model, batch = made(name, 1.0 if name == "T5" else 4.0).to(dtype), inputs(name)
    oracle, eager, actual = (
        output_and_gradients(model, *how, batch)
        for how in (("eager", torch.float64), ("eager", dtype), (integration.NAME, dtype))
    )
    assert_model_close(actual, oracle, eager)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kept", [1, 3])
def test_a_model_may_go_on_with_its_last_tokens_only(kept: int, cache: str) -> None:
    model: Any = made("Gemma4")
    logits = []
    for attention in ("eager", integration.NAME):
        model.set_attn_implementation(attention)
        kind = hf.DynamicCache(config=model.config)
        if cache == "static":
            kind = hf.StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            try:
                logits.append(model(IDS, past_key_values=kind, use_cache=True, logits_to_keep=kept).logits)
            except ValueError as error:
                assert (kept, cache) == (3, "dynamic") and attention == integration.NAME
                assert str(error).startswith("attention_mask: must be given")
                return
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


PACKED = torch.cat([IDS[:1], IDS[1:, :8]], 1)  # two sentences, one behind the other
POSITIONS = torch.cat([torch.arange(11), torch.arange(8)])[None]
BOUNDS = torch.tensor([0, 11, 19], dtype=torch.int32)
LENGTHS_TOO = {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 11, "max_length_k": 11}
EVERYTHING = {"attention_mask": torch.ones(1, 19, dtype=torch.long)}  # with it transformers ignores the positions


PACKINGS: dict[str, tuple[str, dict[str, Any], int]] = {  # and how many layers are computed without a mask
    "Llama, positions": ("Llama", {}, 0),
    "Llama, bounds": ("Llama", LENGTHS_TOO, 2),
    "Llama, bounds and mask": ("Llama", LENGTHS_TOO | EVERYTHING, 2),
    "Mistral, positions": ("Mistral", {}, 0),
    "Mistral, bounds": ("Mistral", LENGTHS_TOO, 0),  # windows are left to the mask
    "Mistral, bounds and mask": ("Mistral", LENGTHS_TOO | EVERYTHING, 0),
    "GptOss, bounds": ("GptOss", LENGTHS_TOO, 1),  # whose masks know nothing of positions
    "GptOss, bounds and mask": ("GptOss", LENGTHS_TOO | EVERYTHING, 1),
}


@pytest.mark.parametrize("case", PACKINGS)
def test_packed_sequences_are_those_alone(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, options, layers = PACKINGS[case]
    model, calls = made(name), noted(monkeypatch, "varlen_attention")
    oracle, eager = (alone(model, "eager", dtype) for dtype in (torch.float64, torch.float32))
    actual = gradients_of(model, integration.NAME, torch.float32, [(PACKED, {"position_ids": POSITIONS} | options)])
    assert_model_close(actual, oracle, eager)
    assert len(calls) == layers


def noted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    """The keyword arguments of the calls of one of fastattn's functions."""
    function, calls = getattr(functional, name), []

    def note(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return function(*args, **kwargs)

    monkeypatch.setattr(functional, name, note)
    return calls


def alone(model: Any, implementation: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return gradients_of(model, implementation, dtype, [(IDS[:1], {}), (IDS[1:, :8], {})])


def gradients_of(
    model: Any, implementation: str, dtype: torch.dtype, batches: list[tuple[Tensor, dict[str, Any]]]
) -> dict[str, Tensor]:
    """Logits of all batches, one behind the other, and the gradients of their sum times something."""
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(implementation)
    logits = torch.cat([model(ids, use_cache=False, **options).logits for ids, options in batches], 1)
    dout = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    logits.backward(dout)
    return {"out": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# ---- windows ----


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("name", ["Mistral", "Gemma2", "Gemma3", "GptOss"])
def test_windows_are_bands_where_nothing_else_is_in_the_mask(
    name: str, is_padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = made(name)
    calls = noted(monkeypatch, "scaled_dot_product_attention")
    batch = inputs(name) if is_padded else {"input_ids": IDS}
    layers = 2 if name == "Mistral" else 1  # of the others one layer in two has a window
    model.set_attn_implementation(integration.NAME)
    model(**batch)
    windows = [call["window"] for call in calls if call.get("window")]
    assert windows == ([] if is_padded else [(3, 0)] * layers)
    if not is_padded:  # one token at a time, with the cache
        calls.clear()
        model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, disable_compile=True)
        assert [call["window"] for call in calls if call.get("window")][:layers] == [(3, 0)] * layers


def test_only_a_causal_window_is_taken_for_one() -> None:
    window, chunks = (
        masking.sliding_window_causal_mask_function(4),
        masking.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
    )
    both = masking.sliding_window_bidirectional_mask_function(4)
    for function, is_band in ((window, True), (chunks, False), (both, False)):
        mask = integration.attention_mask(2, 9, 9, mask_function=function, local_size=4, allow_is_causal_skip=False)
        assert mask is not None and hasattr(mask, integration._BAND) == is_band
    mask = integration.attention_mask(2, 3, 9, 6, mask_function=window, local_size=4, allow_is_causal_skip=False)
    assert getattr(mask, integration._BAND) == (3, 0)  # behind a cache of six tokens
    mask = integration.attention_mask(2, 3, 9, 0, mask_function=window, local_size=4, allow_is_causal_skip=False)
    assert not hasattr(mask, integration._BAND)  # before six places of one that is empty


def test_a_mask_that_has_lost_its_mark_says_the_same() -> None:
    q, k, v = (torch.randn(2, 4, n, 8) for n in (3, 9, 9))
    window = masking.sliding_window_causal_mask_function(4)
    mask = integration.attention_mask(2, 3, 9, 6, mask_function=window, local_size=4, allow_is_causal_skip=False)
    assert mask is not None
    marked, lost = (integration.attention_forward(LAYER, q, k, v, x)[0] for x in (mask, mask.clone()))
    torch.testing.assert_close(marked, lost)


# ---- one call ----


def test_a_callers_float_mask_is_added_to_the_position_bias_and_cut_to_the_keys() -> None:
    q, k, v = (torch.randn(2, 4, n, 8, dtype=torch.float64) for n in (5, 9, 9))
    mask = torch.randn(2, 1, 5, 12, dtype=torch.float64)
    bias = torch.randn(1, 4, 5, 9, dtype=torch.float64)
    scores = 0.3 * q @ k.mT + mask[..., :9]
    for position_bias, expected in ((None, scores), (bias, scores + bias)):
        out, weights = integration.attention_forward(
            LAYER, q, k, v, mask, scaling=0.3, is_causal=True, position_bias=position_bias
        )
        assert weights is None and out.is_contiguous()
        assert (out - (expected.softmax(-1) @ v).transpose(1, 2)).abs().max() < 1e-12


def test_a_layer_that_says_nothing_is_causal() -> None:
    q, k, v = (torch.randn(2, 4, 9, 8, dtype=torch.float64) for _ in range(3))
    scores = q @ k.mT * 8**-0.5
    causal = scores.masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
    expected = (causal.softmax(-1) @ v).transpose(1, 2)
    assert (integration.attention_forward(LAYER, q, k, v, None)[0] - expected).abs().max() < 1e-12
    bidirectional = nn.Module()
    bidirectional.is_causal = False  # type: ignore[assignment]
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    assert (integration.attention_forward(bidirectional, q, k, v, None)[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["none", "bool", "float", "bounds"])
def test_chosen_keys_are_attended_to_and_no_others(kind: str) -> None:
    q, k, v = (torch.randn(1, 4, 9, 8, dtype=torch.float64) for _ in range(3))
    indices = torch.stack([torch.randperm(9)[:3] for _ in range(9)])[None]
    indices[..., 0] = torch.arange(9)  # each its own, so that no row is empty
    allowed = torch.zeros(1, 9, 9, dtype=torch.bool).scatter(-1, indices, True)[:, None]
    bounds, order = torch.tensor([0, 4, 9], dtype=torch.int32), torch.ones(9, 9, dtype=torch.bool).tril()
    mask = {"bool": order, "float": torch.zeros(9, 9).double().masked_fill(~order, -torch.inf)}.get(kind)
    options = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds} if kind == "bounds" else {}
    allowed = allowed & order
    if kind == "bounds":
        allowed = allowed & torch.block_diag(torch.ones(4, 4), torch.ones(5, 5)).bool()
    expected = ((q @ k.mT * 8**-0.5).masked_fill(~allowed, -torch.inf).softmax(-1) @ v).transpose(1, 2)
    mask = None if mask is None else mask[None, None]
    out, _ = integration.attention_forward(LAYER, q, k, v, mask, indices=indices, **options)
    assert (out - expected).abs().max() < 1e-12


def test_packed_sequences_with_a_position_bias_keep_their_order() -> None:
    q, k, v = (torch.randn(1, 4, 9, 8, dtype=torch.float64) for _ in range(3))
    bias, bounds = torch.randn(1, 4, 9, 9, dtype=torch.float64), torch.tensor([0, 4, 9], dtype=torch.int32)
    allowed = torch.block_diag(torch.ones(4, 4), torch.ones(5, 5)).tril().bool()
    expected = ((q @ k.mT * 8**-0.5 + bias).masked_fill(~allowed, -torch.inf).softmax(-1) @ v).transpose(1, 2)
    out, _ = integration.attention_forward(
        LAYER, q, k, v, None, position_bias=bias, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds
    )
    assert (out - expected).abs().max() < 1e-12


def test_weights_are_dropped() -> None:
    keys = torch.ones(1, 1, 64, 64)  # equal weights, and values that name the keys
    torch.manual_seed(0)
    out, _ = integration.attention_forward(
        LAYER, keys, keys, 64 * torch.eye(64)[None, None], None, 0.25, is_causal=False
    )
    dropped = (out == 0).double().mean().item()
    assert abs(dropped - 0.25) < 0.03  # 4.5 standard deviations of 4096 draws
    assert (out[out != 0] - 1 / 0.75).abs().max() < 1e-5


# ---- what is refused ----

X = torch.randn(2, 4, 5, 8)
OF_FIVE = torch.tensor([0, 2, 5], dtype=torch.int32)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"output_attentions": True}, r"^output_attentions: must be False, got True; .*'eager'"),
    "paged": ({"cache": object()}, r"^cache: must be None, .*dynamic or static cache$"),
    "other sinks": ({"sinks": X}, r"^sinks: must be None, .*'eager'$"),
    "sparse blocks": ({"block_indices": X}, r"^block_indices: must be None, .*'eager'$"),
    "chosen keys of some": (
        {"indices": torch.zeros(2, 4, 2)},
        r"^indices: must have shape \(2, 5, chosen keys\), .*'eager'$",
    ),
    "order unknown": ({"keys": torch.randn(2, 4, 9, 8)}, r"^attention_mask: must be given .*, 9 keys and 5 queries$"),
    "bounds of keys": ({"cu_seq_lens_q": OF_FIVE}, r"^cu_seq_lens_k: must be given with its twin, got None$"),
    "bounds of queries": ({"cu_seq_lens_k": OF_FIVE}, r"^cu_seq_lens_q: must be given with its twin, got None$"),
    "packed twice": ({"cu_seq_lens_q": OF_FIVE, "cu_seq_lens_k": OF_FIVE}, r"^cu_seq_lens_q: .* batch of 1, .*got 2$"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused(case: str) -> None:
    options, message = dict(REFUSED[case][0]), REFUSED[case][1]
    with pytest.raises(ValueError, match=message):
        integration.attention_forward(LAYER, X, *[options.pop("keys", X)] * 2, None, **options)
