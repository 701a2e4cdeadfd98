"""What other processes do in the tests of the CPU kernels; they import it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import fastattn

SHAPE = (2, 4, 160, 16)  # long enough for several threads


def attend(seed: int) -> list[Tensor]:
    """out and gradients of a problem, on the CPU kernels."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(SHAPE, generator=generator).requires_grad_() for _ in range(3))
    with fastattn.use_backend("cpu"):
        out = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), out.detach())]


class Attended(Dataset[Tensor]):
    """Problems whose gradients are computed where an item is loaded."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.stack(attend(index))


def model() -> nn.Module:
    """A layer of attention, the same everywhere."""
    torch.manual_seed(0)
    return fastattn.MultiHeadAttention(32, 4, batch_first=True)


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    out, _ = layer(x, x, x, need_weights=False)
    out.square().mean().backward()
    return [p.grad for p in layer.parameters() if p.grad is not None]


def train(rank: int, world: int, x: Tensor, folder: str) -> None:
    """Saves the gradients of one process of several, each of which has a share of the batch."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.set_num_threads(2)
    layer = DistributedDataParallel(model())
    torch.save(gradients(layer, x.chunk(world)[rank]), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
