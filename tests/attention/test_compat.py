"""Private torch API: every name is there and means what fastattn takes it to mean, and no other file uses any."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn import compat

PRIVATE = re.compile(r"\btorch\._[A-Za-z]|\b_dynamo_")


def test_every_name_exists() -> None:
    """All but that of the current stream, which builds for the CPU alone lack; they say so when it is asked for."""
    assert hasattr(torch._C, "_cuda_getCurrentRawStream") == torch.backends.cuda.is_built()
    if not torch.backends.cuda.is_built():
        with pytest.raises(RuntimeError, match="built without CUDA"):
            compat.current_stream(0)

    assert not compat.is_any_autocast_enabled()
    with torch.autocast("cpu"):
        assert compat.is_any_autocast_enabled()

    assert compat.count_dispatch_modes() == 0
    with FakeTensorMode():
        assert compat.count_dispatch_modes() == 1

    assert compat.sdpa is torch.nn.functional.scaled_dot_product_attention
    assert type(torch.nested.nested_tensor([torch.zeros(1)], layout=torch.jagged)) is compat.JaggedTensor
    compat.check(True)
    with pytest.raises(RuntimeError):
        compat.check(False)

    seen = []

    def see(x: torch.Tensor) -> torch.Tensor:
        seen.append(compat.innermost_transformation())
        return x

    see(torch.zeros(2))
    torch.vmap(see)(torch.zeros(2))
    assert seen[0] is None and seen[1] is not None


def test_what_lies_in_memory_is_told_from_what_does_not() -> None:
    x = torch.ones(2, 3)
    assert not compat.is_lazy(x)
    assert compat.is_lazy(torch._neg_view(x)) and compat.is_lazy(torch._efficientzerotensor(2))
    seen = []
    y = x.clone().requires_grad_()
    z = y * 2
    z.register_hook(lambda grad: seen.append(compat.is_lazy(grad)))
    torch.autograd.grad(z, y, torch.ones(2, 2, 3), is_grads_batched=True)
    assert seen == [True]


def test_a_tangent_is_seen_where_it_is() -> None:
    x, seen = torch.ones(3), []
    assert not compat.has_tangent([x])
    with torch.autograd.forward_ad.dual_level():
        assert not compat.has_tangent([x, None])
        assert compat.has_tangent([x, torch.autograd.forward_ad.make_dual(x, x)])
    torch.func.jvp(lambda x: seen.append(compat.has_tangent([x])) or x, (x,), (x,))
    assert seen == [True]


def test_lists_under_a_transformation() -> None:
    x = torch.tensor([3, 1, 2])
    assert torch.func.grad(lambda y: y * sum(compat.to_list(x)))(torch.tensor(1.0)) == 6
    assert compat.to_list(x) == [3, 1, 2]


def test_tracing_is_seen() -> None:
    seen = []
    torch.jit.trace(lambda x: seen.append(compat.is_jit_tracing()) or x + 1, torch.ones(1), check_trace=False)
    assert seen[0] and not compat.is_jit_tracing()


def test_a_constant_is_marked_as_torch_marks_it() -> None:
    theirs = torch.compiler.assume_constant_result(lambda: 1)
    assert vars(compat.assume_constant(lambda: 1)) == vars(theirs)


def test_private_api_stands_in_one_file() -> None:
    assert PRIVATE.search("torch._C._len_torch_dispatch_stack()")
    package = Path(fastattn.__file__).parent
    users = {file.name for file in package.rglob("*.py") if PRIVATE.search(file.read_text())}
    assert users == {"compat.py"}
