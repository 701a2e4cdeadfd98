"""Models written with torch.nn.MultiheadAttention."""

from __future__ import annotations

import warnings
from typing import Literal, TypeVar

from torch import nn

from ..modules import MultiHeadAttention

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def replace_attention(model: ModuleT, need_weights: Literal[False] | None = None) -> ModuleT:
    """Turn every nn.MultiheadAttention in a model into a fastattn.MultiHeadAttention, in place.

    The modules stay the same objects with another class: parameters, hooks, device, dtype, training mode, state_dict,
    optimizers and modules used in several places are untouched. nn.TransformerEncoder is told to keep padded tensors.
    Subclasses of nn.MultiheadAttention are left as they are, since they may compute something else.

    Args:
        model: any module; an nn.MultiheadAttention itself too.
        need_weights: None to return the attention weights when the caller asks; False to return None in their place,
            for models that ask for them (it is the default of torch's forward) and ignore them.

    Returns:
        The model.

    Raises:
        ValueError: need_weights is neither None nor False.

    Warns:
        UserWarning: the model contains neither of the two classes.
    """
    if need_weights is not None and need_weights is not False:
        raise ValueError(f"need_weights: must be None or False, got {need_weights!r}")
    found = False
    for module in model.modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = MultiHeadAttention
            module.__setstate__(module.__dict__)
        if isinstance(module, MultiHeadAttention):
            module.need_weights = need_weights
            found = True
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    if not found:
        warnings.warn(f"replace_attention: no nn.MultiheadAttention in {type(model).__name__}", stacklevel=2)
    return model
