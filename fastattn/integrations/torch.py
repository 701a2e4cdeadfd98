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
    Where torch itself has given a module a class made for it (parametrizations, fully_shard), so does this function.

    Left as they are, with a warning that names them: other subclasses of nn.MultiheadAttention, since they may compute
    something else, and modules with a forward of their own, such as a wrapper or a compiled one, which calls torch's.

    Args:
        model: any module; an nn.MultiheadAttention itself too.
        need_weights: None to return the attention weights when the caller asks; False to return None in their place,
            for models that ask for them (it is the default of torch's forward) and ignore them.

    Returns:
        The model.

    Raises:
        ValueError: need_weights is neither None nor False.

    Warns:
        UserWarning: the model contains neither of the two classes, or some modules are left as they are.
    """
    if need_weights is not None and need_weights is not False:
        raise ValueError(f"need_weights: must be None or False, got {need_weights!r}")
    found, left = False, []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiHeadAttention):
            if why := _why_left(module):
                left.append(f"{name or 'the model itself'} ({why})")
                continue
            module.__class__ = _with_our_base(type(module))
            module.__setstate__(module.__dict__)
        if isinstance(module, MultiHeadAttention):
            module.need_weights = need_weights
            found = True
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    if left:
        warnings.warn(f"replace_attention: left as they are: {', '.join(left)}", stacklevel=2)
    elif not found:
        warnings.warn(f"replace_attention: no nn.MultiheadAttention in {type(model).__name__}", stacklevel=2)
    return model


def _why_left(module: nn.MultiheadAttention) -> str | None:
    """Why a module does not compute what nn.MultiheadAttention.forward does, or may not."""
    if "forward" in vars(module):
        return "its forward is set on the module; replace first, wrap or compile afterwards"
    foreign = [c.__name__ for c in type(module).__mro__ if issubclass(c, nn.MultiheadAttention) and not _is_torchs(c)]
    return f"a subclass of nn.MultiheadAttention, {foreign[0]}" if foreign else None


def _is_torchs(cls: type[nn.MultiheadAttention]) -> bool:
    """Whether torch made a class, and not in order to compute something else."""
    return cls is nn.MultiheadAttention or (cls.__module__.startswith("torch.") and "forward" not in vars(cls))


def _with_our_base(cls: type) -> type:
    """The same class over MultiHeadAttention instead of nn.MultiheadAttention, as torch would have made it."""
    if cls is nn.MultiheadAttention:
        return MultiHeadAttention
    if not issubclass(cls, nn.MultiheadAttention):
        return cls
    bases = tuple(_with_our_base(base) for base in cls.__bases__)
    namespace = {name: x for name, x in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, namespace)
