"""Private torch API: all that fastattn uses, with the oldest torch that is known to have it.

fastattn needs torch 2.7. Where a later torch lacks one of these, this is the file to change; a test says which it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
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

# (condition): raise unless it holds, in a traced graph when it runs, where the condition depends on data. torch 2.0
check: Callable[[bool], None] = torch._check

# The class of nested tensors of layout torch.jagged. torch 2.1
JaggedTensor: type[Tensor] = NestedTensor


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
