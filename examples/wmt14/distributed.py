"""The processes that train one model together: torchrun starts them, one per device."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The rank and device of this process, and the number of processes."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str | None = None) -> World:
        """Meets the other processes, if torchrun started this one; nccl between GPUs, gloo between CPUs.

        Args:
            device: "cpu", "cuda", ...; by default this process's own GPU, or the CPU where there is none.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if device in (None, "cuda"):
            device = f"cuda:{local_rank}" if device or torch.cuda.is_available() else "cpu"
        chosen = torch.device(device)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size > 1:
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(int(os.environ.get("RANK", 0)), size, chosen)

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Overwrites `values` with their sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values that all processes give, in the order of their ranks."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until every process has come here."""
        self.gather(None)

    def leave(self) -> None:
        """Leave the group of processes."""
        if self.size > 1:
            dist.destroy_process_group()
            # DistributedDataParallel keeps gloo's threads alive, and one that asks for Python's lock while the
            # interpreter ends aborts the process: here they get the lock, to let go of what they have done.
            time.sleep(0.2)
