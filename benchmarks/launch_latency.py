"""Times the host's part of a call: from Python to cuLaunchKernel's return, on any machine.

    python -m benchmarks.launch_latency          --quick for a quarter of the rounds, --smoke for a few calls

A stub stands in for libcuda and does nothing, so that what is left is fastattn's own time and torch's. A call on a GPU
also asks torch for the current stream and the driver for the launch itself. The tensors are tiny: the same call through
F.scaled_dot_product_attention on the CPU shows what torch needs. Needs a C++ compiler and no GPU; where there is one,
the results stand with its own. Writes launch_latency.csv and launch_latency.json.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from benchmarks import stub_cuda
from benchmarks.command import Command, parser
from benchmarks.host_timing import HostCall, HostTime, time_in_turns
from benchmarks.result_table import ResultTable
from benchmarks.shared_library import BuildError
from fastattn import backends
from fastattn.arguments import attention_params
from fastattn.params import AttentionParams, Backward, Buffers, Forward

SHAPE = (1, 1, 8, 8)
COLUMNS = ("op", "min_us", "p50_us", "p80_us")


def put_stub_in_the_place_of_libcuda(folder: Path) -> None:
    """Compiles the stub into a folder; it records nothing and has device 0's context current."""
    library = folder / "libcuda.so"
    stub_cuda.build(library)
    os.environ["FASTATTN_LIBCUDA"] = str(library)
    stub = ctypes.CDLL(str(library))
    stub.stub_record(0)
    stub.stub_make_current(0)


@contextmanager
def launching_on_the_stub() -> Iterator[None]:
    """Inside, attention calls launch the CUDA kernels on the stub's first device, whatever the tensors' device."""
    from fastattn import _launcher
    from fastattn.cuda_kernels import attention

    class FirstDevice(attention.Device):
        """The stub's first device, in the place of the one that the tensors are on."""

        def multiprocessors(self, device: torch.device) -> int:
            return 56

        def has_mma(self, element: str, device: torch.device) -> bool:
            return False

        def launch(self, kernel: str, element: str, grid: tuple[int, int, int], p: AttentionParams, b: Buffers) -> None:
            _launcher.launch(kernel, element, 0, 0, grid, p, b)

    _launcher.set_image_source(lambda element, capability: b"")
    with backends.anywhere("cuda"), attention.on(FirstDevice()), fastattn.use_backend("cuda"):
        yield


def operations() -> Iterator[tuple[str, HostCall]]:
    """The calls that are timed: the launcher, then what is around it layer by layer, then what torch needs."""
    from fastattn import _launcher
    from fastattn.cuda_kernels import attention

    q, k, v = torch.randn(3, *SHAPE).unbind()
    p = attention_params(q, k, v)
    forward = Forward(torch.empty_like(q), torch.empty(SHAPE[:-1]))
    buffers = Buffers(*forward)
    backward = buffers._replace(dout=forward.out, dlse=forward.lse, delta=forward.lse, dq=q, dk=k, dv=v)
    grid, kernel = (1, 1, 1), attention.choose_kernel("attention_fwd", *attention.sizes(p)).name

    yield "pack", lambda: _launcher.pack("float32", p, buffers)
    yield "pack, backward", lambda: _launcher.pack("float32", p, backward)
    yield "launch", lambda: _launcher.launch(kernel, "float32", 0, 0, grid, p, buffers)
    yield "kernel choice and launch", lambda: attention.attention_fwd(forward, p)
    yield "operator", lambda: torch.ops.fastattn.attention_fwd(*p, "cuda")
    yield "checks of the arguments", lambda: attention_params(q, k, v)
    yield "choice of the backend", lambda: backends.choose(backends.traits(p, False))
    yield from calls("forward", "fastattn", fastattn.scaled_dot_product_attention)
    yield from calls("forward", "torch on the CPU", F.scaled_dot_product_attention)
    yield "two torch.empty", lambda: (torch.empty(SHAPE), torch.empty(SHAPE[:-1]))


@contextmanager
def triton_operations(folder: Path) -> Iterator[dict[str, HostCall]]:
    """Triton's launches on a stub of their own; none where there is no Triton, or a libcuda already."""
    if backends.get("triton").why_missing() or torch.cuda.is_available():
        yield {}
        return
    from benchmarks import stub_triton
    from fastattn.triton_kernels import arguments, attention

    if arguments.IS_INTERPRETED:
        yield {}
        return
    folder.mkdir()
    device, stub = stub_triton.start(folder, (9, 0))
    stub.stub_record(0)
    q, k, v = torch.randn(3, *SHAPE).unbind()
    p, forward = attention_params(q, k, v), Forward(torch.empty_like(q), torch.empty(SHAPE[:-1]))
    dq, dk, dv = torch.empty(3, *SHAPE).unbind()
    backward = Backward(forward.out, forward.lse, q, None, dq, dk, dv, None)
    with attention.on(device):
        yield {
            "Triton's kernel choice and launch": lambda: attention.attention_fwd(forward, p),
            "Triton's kernel choice and launch, backward": lambda: attention.attention_bwd(backward, p),
        }


def calls(what: str, whose: str, attend: Callable[..., Any]) -> Iterator[tuple[str, HostCall]]:
    """Calls of a function of q, k and v: without gradient, with it, and with the backward pass."""
    q, k, v = torch.randn(3, *SHAPE).unbind()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn(SHAPE)
    yield f"{what}, {whose}", lambda: attend(q, k, v)
    yield f"{what} with gradient, {whose}", lambda: attend(*leaves)
    yield f"{what} and backward, {whose}", lambda: torch.autograd.grad(attend(*leaves), leaves, dout)


def measure(command: Command) -> dict[str, HostTime]:
    """The times of all operations."""
    with (
        tempfile.TemporaryDirectory() as folder,
        launching_on_the_stub(),
        triton_operations(Path(folder, "triton")) as of_triton,
    ):
        put_stub_in_the_place_of_libcuda(Path(folder))
        wanted = {name: call for name, call in (*operations(), *of_triton.items()) if command.wants(name)}
        return time_in_turns(wanted, command.sized(3, 100, 400), command.sized(20, 100, 100), torch.device("cpu"))


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    options = parser("launch_latency", "Time the host's part of a launch.").parse_args(arguments)
    if missing := backends.get("cuda").why_missing():
        print(f"the cuda backend {missing}; nothing was measured", file=sys.stderr)
        return 1
    try:
        command = Command.of(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        times = measure(command)
    except BuildError as error:
        print(f"{error}; nothing was measured", file=sys.stderr)
        return 1
    print(f"{'':<44}{'min':>9}{'p50':>9}{'p80':>9}  microseconds")
    with ResultTable(command, "launch_latency", COLUMNS) as table:
        for name, time in times.items():
            numbers = {column: f"{microseconds:.2f}" for column, microseconds in time._asdict().items()}
            table.add(op=name, **numbers)
            print(f"{name:<44}" + "".join(f"{text:>9}" for text in numbers.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
