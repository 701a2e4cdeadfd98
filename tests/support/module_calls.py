"""Every constructor argument and every kind of call of MultiHeadAttention, beside torch.nn.MultiheadAttention."""

from __future__ import annotations

import torch
from torch import nn

from fastattn.modules import MultiHeadAttention

EMBED, HEADS, BATCH, SEQLEN_Q, SEQLEN_K = 12, 3, 2, 5, 7

CONSTRUCTORS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False, "batch_first": True},
    "one_head": {"num_heads": 1},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "bias_kv-zero_attn": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "kdim-vdim": {"kdim": 8, "vdim": 10, "batch_first": True},
    "vdim-bias_kv": {"vdim": 10, "add_bias_kv": True},
    "kdim-no_bias-zero_attn": {"kdim": 8, "bias": False, "add_zero_attn": True},
}

# inputs: the tensors given as query, key, value. same: one tensor; memory: key is value; apart: three.
CALLS = {
    "same": {"inputs": "same"},
    "memory": {"inputs": "memory"},
    "apart": {"inputs": "apart"},
    "unbatched": {"inputs": "unbatched"},
    "no_weights": {"inputs": "memory", "need_weights": False},
    "weights_per_head": {"inputs": "same", "average_attn_weights": False},
    "padding": {"inputs": "same", "key_padding_mask": "bool"},
    "padding-no_weights": {"inputs": "memory", "key_padding_mask": "bool", "need_weights": False},
    "float_padding": {"inputs": "apart", "key_padding_mask": "float", "average_attn_weights": False},
    "unbatched-padding": {"inputs": "unbatched", "key_padding_mask": "bool", "average_attn_weights": False},
    "mask": {"inputs": "same", "attn_mask": "bool"},
    "mask_per_head": {"inputs": "memory", "attn_mask": "bool per head", "need_weights": False},
    "float_mask": {"inputs": "memory", "attn_mask": "float", "average_attn_weights": False},
    "float_mask_per_head": {"inputs": "same", "attn_mask": "float per head"},
    "unbatched-mask_per_head": {"inputs": "unbatched", "attn_mask": "bool per head"},
    "mask-padding": {"inputs": "memory", "attn_mask": "bool", "key_padding_mask": "bool"},
    "mask_per_head-padding": {"inputs": "same", "attn_mask": "bool per head", "key_padding_mask": "bool"},
    "float_mask-float_padding": {"inputs": "apart", "attn_mask": "float", "key_padding_mask": "float"},
    "mask-float_padding": {"inputs": "memory", "attn_mask": "bool", "key_padding_mask": "float"},
    "float_mask_per_head-padding": {"inputs": "same", "attn_mask": "float per head", "key_padding_mask": "bool"},
    "unbatched-both": {"inputs": "unbatched", "attn_mask": "float", "key_padding_mask": "bool"},
    "causal": {"inputs": "same", "attn_mask": "causal", "is_causal": True, "need_weights": False},
    "causal-weights": {"inputs": "memory", "attn_mask": "causal", "is_causal": True},
    "float_causal": {"inputs": "same", "attn_mask": "float causal", "is_causal": True, "need_weights": False},
    "causal-padding": {"inputs": "same", "attn_mask": "causal", "is_causal": True, "key_padding_mask": "bool"},
    "causal-float_padding": {
        "inputs": "memory", "attn_mask": "float causal", "is_causal": True, "key_padding_mask": "float"
    },
}  # fmt: skip


def make_pair(dtype=torch.float64, **kwargs):
    """torch's module and ours with the same random parameters, biases included."""
    kwargs = {"embed_dim": EMBED, "num_heads": HEADS, "dtype": dtype, **kwargs}
    torch.manual_seed(0)
    stock, ours = nn.MultiheadAttention(**kwargs), MultiHeadAttention(**kwargs)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(std=0.5)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def make_inputs(module, kind, dtype=torch.float64):
    """query, key, value that require grad."""

    def tensor(seqlen, features):
        shape = (BATCH, seqlen, features) if module.batch_first else (seqlen, BATCH, features)
        shape = (seqlen, features) if kind == "unbatched" else shape
        return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()

    if module.kdim != module.vdim or module.kdim != module.embed_dim:
        kind = "apart" if kind in ("same", "memory") else kind
    query = tensor(SEQLEN_Q, module.embed_dim)
    if kind == "same":
        return query, query, query
    key = tensor(SEQLEN_K, module.kdim)
    return query, key, key if kind == "memory" else tensor(SEQLEN_K, module.vdim)


def make_mask(kind, shape, dtype=torch.float64):
    """A mask of which the first key is never blocked; a float one requires grad."""
    if kind is None:
        return None
    if "causal" in kind:
        mask = torch.ones(shape, dtype=torch.bool).triu(1)
        return torch.zeros(shape, dtype=dtype).masked_fill(mask, -torch.inf) if "float" in kind else mask
    if "float" in kind:
        return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def make_call(module, call, dtype=torch.float64):
    """The arguments of one call of CALLS, as tensors."""
    torch.manual_seed(1)
    call = dict(call)
    kind = call.pop("inputs")
    query, key, value = make_inputs(module, kind, dtype)
    batch = 1 if kind == "unbatched" else BATCH
    seqlen_q, seqlen_k = (x.size(-2 if module.batch_first or kind == "unbatched" else 0) for x in (query, key))
    padding_shape = (seqlen_k,) if kind == "unbatched" else (batch, seqlen_k)
    mask_kind = call.pop("attn_mask", None)
    per_head = (batch * module.num_heads,) if mask_kind and "per head" in mask_kind else ()
    return {
        "query": query,
        "key": key,
        "value": value,
        "key_padding_mask": make_mask(call.pop("key_padding_mask", None), padding_shape, dtype),
        "attn_mask": make_mask(mask_kind, (*per_head, seqlen_q, seqlen_k), dtype),
        **call,
    }


def run(module, arguments):
    """Outputs, weights and every gradient of a call, under random upstream gradients."""
    results = {}
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    leaves = {**tensors, **dict(module.named_parameters())}
    results["out"], weights = module(**arguments)
    generator = torch.Generator().manual_seed(2)
    loss = 0.0
    if weights is not None:
        results["weights"] = weights
    for x in list(results.values()):
        upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        loss = loss + (x * upstream).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    results.update({f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)})
    return results
