"""Every way in which torch can be asked for derivatives of a function of one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.autograd.functional as functional
from torch import Tensor
from torch.autograd import grad

Function = Callable[[Tensor], Tensor]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def _energy(f: Function) -> Function:
    """A scalar whose derivatives depend on f's own."""
    return lambda x: f(x).pow(2).sum()


def _tangent(x: Tensor) -> Tensor:
    return torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)


def _batched(f: Function, x: Tensor) -> Tensor:
    x = _leaf(x)
    out = f(x)
    upstream = torch.stack([torch.ones_like(out), _tangent(out), torch.zeros_like(out)])
    return grad(out, x, upstream, is_grads_batched=True)[0]


def _dual(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, _tangent(x)))).tangent
    assert tangent is not None
    return tangent


def _of_first(f: Function, x: Tensor) -> Tensor:
    """Second derivatives by autograd.grad, of a sum in which the first derivatives do not hide them."""
    x = _leaf(x)
    (first,) = grad(_energy(f)(x), x, create_graph=True)
    return grad(first.pow(2).sum() + x.sum(), x)[0]


def _penalty(f: Function, x: Tensor) -> Tensor:
    """A gradient penalty, by .backward()."""
    x = _leaf(x)
    (first,) = grad(f(x).sum(), x, create_graph=True)
    (first.norm() - 1).pow(2).backward()
    return x.grad


def _inner_step(f: Function, x: Tensor) -> Tensor:
    """The gradient through an inner step of gradient descent (MAML)."""
    x = _leaf(x)
    (first,) = grad(_energy(f)(x), x, create_graph=True)
    return grad(_energy(f)(x - 0.1 * first), x)[0]


def _third(f: Function, x: Tensor) -> Tensor:
    x = _leaf(x)
    (first,) = grad(_energy(f)(x), x, create_graph=True)
    (second,) = grad(first.pow(3).sum(), x, create_graph=True)
    return grad(second.pow(2).sum(), x)[0]


Mode = Callable[[Function, Tensor], Any]

FIRST: dict[str, Mode] = {
    "backward": lambda f, x: grad(_energy(f)(y := _leaf(x)), y)[0],
    "func.grad": lambda f, x: torch.func.grad(_energy(f))(x),
    "func.vjp": lambda f, x: torch.func.vjp(f, x)[1](_tangent(f(x)))[0],
    "func.jacrev": lambda f, x: torch.func.jacrev(lambda x: f(x).sum(-1))(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(_energy(f)), randomness="same")(
        torch.stack([x, x + 1, -x])
    ),
    "is_grads_batched": _batched,
    "functional.jacobian": lambda f, x: functional.jacobian(lambda x: f(x).sum(-1), x),
    "functional.jacobian(vectorize)": lambda f, x: functional.jacobian(lambda x: f(x).sum(-1), x, vectorize=True),
}
FORWARD: dict[str, Mode] = {
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (_tangent(x),))[1],
    "func.jacfwd": lambda f, x: torch.func.jacfwd(lambda x: f(x).sum(-1))(x),
    "func.linearize": lambda f, x: torch.func.linearize(f, x)[1](_tangent(x)),
    "dual_level": _dual,
    "functional.jacobian(forward-mode)": lambda f, x: functional.jacobian(
        lambda x: f(x).sum(-1), x, vectorize=True, strategy="forward-mode"
    ),
    "func.hessian": lambda f, x: torch.func.hessian(_energy(f))(x),
    "func.jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(_energy(f)), (x,), (_tangent(x),))[1],
    "functional.hessian(forward-mode)": lambda f, x: functional.hessian(
        _energy(f), x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
}
SECOND: dict[str, Mode] = {
    "grad of grad": _of_first,
    "gradient penalty": _penalty,
    "inner step": _inner_step,
    "functional.hvp": lambda f, x: functional.hvp(_energy(f), x, _tangent(x))[1],
    "functional.vhp(strict)": lambda f, x: functional.vhp(_energy(f), x, _tangent(x), strict=True)[1],
    "functional.jvp": lambda f, x: functional.jvp(f, x, _tangent(x))[1],
    "functional.hessian": lambda f, x: functional.hessian(_energy(f), x),
    "functional.hessian(vectorize)": lambda f, x: functional.hessian(_energy(f), x, vectorize=True),
    "func.jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(_energy(f)))(x),
    "func.grad of grad": lambda f, x: torch.func.grad(lambda x: torch.func.grad(_energy(f))(x).pow(2).sum())(x),
    "third": _third,
}
