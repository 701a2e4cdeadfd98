"""Private torch API: all that fastattn uses, with the oldest torch that is known to have it.

fastattn needs torch 2.7. Where a later torch lacks one of these, this is the file to change; a test says which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nested._internal.nested_tensor import NestedTensor

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

# Bound to names of this module, because each is asked at every call: a function around it would cost as much as it.

# () -> bool: autocast is on for some type of device. torch 2.0
is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled

# () -> int: how many dispatch modes are active, such as those of fake tensors and counters of FLOPs. torch 2.0
count_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack

# () -> object | None: the innermost transformation of torch.func that is running. torch 2.0
innermost_transformation: Callable[[], object] = torch._C._functorch.peek_interpreter_stack

# F.scaled_dot_product_attention as torch made it, whatever stands in its place there by now. torch 2.0
sdpa: Callable[..., Tensor] = torch._C._nn.scaled_dot_product_attention


def script_as_sdpa(function: Callable[..., Tensor]) -> None:
    """Let torch.jit.script take a function that stands in the place of F.scaled_dot_product_attention for torch's own.

    torch 1.10.
    """
    torch.jit._builtins._register_builtin(function, "aten::scaled_dot_product_attention")


# (condition): raise unless it holds, in a traced graph when it runs, where the condition depends on data. torch 2.0
check: Callable[[bool], None] = torch._check

# The class of nested tensors of layout torch.jagged. torch 2.1
JaggedTensor: type[Tensor] = NestedTensor


def is_jit_tracing() -> bool:
    """Whether torch.jit.trace is recording. torch 1.11."""
    return not torch.compiler.is_dynamo_compiling() and torch._C._is_tracing()


# (Tensor) -> bool: one of a batch of gradients, as torch.autograd.grad(is_grads_batched=True) makes them. torch 2.0
_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def is_lazy(x: Tensor) -> bool:
    """Whether the tensor is not what lies in its memory: still to be negated, zeros without memory, one of a batch.

    torch 1.11.
    """
    return x.is_neg() or x._is_zerotensor() or _is_batched(x)


def to_list(x: Tensor) -> list[int]:
    """x.tolist(), which before torch 2.8 does not work while torch.func is at work."""
    return x.tolist() if innermost_transformation() is None else [int(value) for value in x]


def has_tangent(tensors: Iterable[Tensor | None]) -> bool:
    """Whether one of them is differentiated in forward mode.

    torch.func may hide a tangent under another transformation: there, any forward mode counts. torch 1.11.
    """
    if forward_ad._current_level < 0:
        return False
    if innermost_transformation() is not None:
        return True
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


# A context manager: operators go past their autograd kernels. torch 2.0
below_autograd = torch._C._AutoDispatchBelowAutograd


def apply_to_one_level(function: type[torch.autograd.Function], args: tuple[Any, ...]) -> Any:
    """function.apply for an operator's autograd kernel, where torch.func has taken the other levels off already.

    torch 2.0.
    """
    from torch._functorch.utils import enable_single_level_autograd_function

    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _no_streams(device: int) -> int:
    raise RuntimeError("this torch is built without CUDA, or has no _cuda_getCurrentRawStream")


# (device index) -> cudaStream_t as an int: the current stream. torch 2.0; builds for the CPU alone lack it
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _no_streams)


def assume_constant(function: FunctionT) -> FunctionT:
    """Mark a function as torch.compiler.assume_constant_result does, without the seconds that importing that takes.

    torch 2.0.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def compile_again_unless(holds: Callable[[], bool], what: str) -> None:
    """Inside a function that torch.compile takes for constant: the graph being made is good for while `holds()` only.

    torch 2.7.
    """
    from torch._dynamo.source import GlobalStateSource
    from torch._guards import Guard, TracingContext

    def create(builder: Any, guard: Any) -> None:
        add = builder.guard_manager.root.add_lambda_guard
        lines = [what]
        # Later versions take the user's stack, too.
        add(lambda _: holds(), lines) if torch.__version__ < "2.10" else add(lambda _: holds(), lines, None)

    TracingContext.get().guards_context.dynamo_guards.add(Guard(GlobalStateSource(), create))


def sleep_on_gpu(cycles: int) -> None:
    """Queue a kernel that does nothing for so many cycles of the GPU's clock."""
    torch.cuda._sleep(cycles)
