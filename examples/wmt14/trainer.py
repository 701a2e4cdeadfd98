"""One update of the paper's training (section 5), shared by all processes.

Every process computes its parts of the update's pairs, one per accumulation step. The loss of a part is divided by the
target tokens of the whole update, which every process knows, so the gradient is that of the mean over all of them. The
random numbers of dropout depend on the seed, the update and the part alone: who computes a part changes nothing.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastattn import Transformer
from fastattn.nmt.batches import TokenBatches
from fastattn.nmt.data import ParallelTokens
from fastattn.nmt.layout import PackedTokens
from fastattn.nmt.losses import LossSums, label_smoothed_cross_entropy

from .configs import Config
from .distributed import World
from .throughput import DTYPES

_LEAST_LOSS_SCALE = 2.0**-10  # a float16 gradient that overflows even at this scale is not finite itself


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite; the parameters are those before the update."""

    def __init__(self, update: int, pairs: list[int], tensors: list[str]) -> None:
        self.update, self.pairs, self.tensors = update, pairs, tensors
        shown = ", ".join(map(str, pairs[:20])) + (", ..." if len(pairs) > 20 else "")
        super().__init__(
            f"update {update}: not finite: {', '.join(tensors)}; the batch is the pairs {shown} of the training data"
        )


@dataclass(frozen=True)
class Step:
    """The record of one update; sums and means are over all processes."""

    loss: float  # nats per target token, label smoothing included
    nll: float  # nats per target token
    gradient_norm: float
    learning_rate: float
    num_pairs: int
    source_tokens: int
    target_tokens: int
    loss_scale: float
    is_applied: bool  # False: a float16 gradient overflowed, and only the loss scale changed
    stop: bool  # some process was asked to stop


class _LossOfBatch(nn.Module):
    """Model and loss as one module, whose gradients DistributedDataParallel averages."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: Tensor | PackedTokens, target: Tensor | PackedTokens) -> LossSums:
        config = self.model.config
        hidden = self.model.hidden(source, target)
        ids = target.tokens if isinstance(target, PackedTokens) else target
        weight = self.model.output_weight()
        return label_smoothed_cross_entropy(hidden, weight, ids, config.label_smoothing, config.pad_id)


class Trainer:
    """Model, optimiser and loss scale.

    Args:
        config: the recipe.
        model: on the world's device, with the same parameters in every process.
        data: the training pairs.
        batches: how they are divided into updates.
        world: the processes.
        accumulation: steps in which a process computes its share of an update.
        packed: batches without padding.
        seed: of dropout.
    """

    def __init__(
        self,
        config: Config,
        model: Transformer,
        data: ParallelTokens,
        batches: TokenBatches,
        world: World,
        accumulation: int = 1,
        packed: bool = False,
        seed: int = 1,
    ) -> None:
        self.config, self.model, self.data, self.batches, self.world = config, model.train(), data, batches, world
        self.accumulation, self.packed, self.seed = accumulation, packed, seed
        self.parts = world.size * accumulation
        self.loss_of_batch = _LossOfBatch(model)
        self.shared_loss: _LossOfBatch | DistributedDataParallel = self.loss_of_batch
        if world.size > 1:
            self.shared_loss = DistributedDataParallel(
                self.loss_of_batch, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, betas=config.betas, eps=config.eps, fused=True)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")

    def step(self, update: int, pairs: NDArray[np.int64], stop: bool = False) -> Step:
        """Makes update number `update`, from 1, of some pairs.

        Args:
            stop: this process was asked to stop; every process learns of it.

        Raises:
            NonFiniteError: the loss or its gradient is not finite; nothing is changed.
        """
        learning_rate = self.config.learning_rate(update)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        source_tokens = int(self.batches.source_lengths[pairs].sum())
        target_tokens = int(self.batches.target_lengths[pairs].sum())
        self.optimizer.zero_grad()
        sums = self._accumulate(update, pairs, target_tokens)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        sums = self.world.sum_(torch.cat([sums, sums.new_tensor([stop])]))
        loss, nll, stops, gradient_norm = torch.cat([sums, norm[None]]).tolist()
        loss_scale = self.scaler.get_scale()
        is_applied = self._check(update, pairs, loss, gradient_norm, loss_scale)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return Step(
            loss / target_tokens, nll / target_tokens, gradient_norm, learning_rate, len(pairs), source_tokens,
            target_tokens, loss_scale, is_applied, stops > 0,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The part of a checkpoint beside the model: states of optimiser and loss scale."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def autocast(self) -> torch.autocast:
        """The autocast context for the recipe's precision of matrix products and attention."""
        precision = self.config.precision
        return torch.autocast(self.world.device.type, DTYPES[precision], enabled=precision != "fp32")

    def _accumulate(self, update: int, pairs: NDArray[np.int64], target_tokens: int) -> Tensor:
        """Leave the gradient, averaged over all processes, in the parameters; returns this process's loss and nll."""
        sums = torch.zeros(2, device=self.world.device)
        factor = self.world.size / target_tokens  # DistributedDataParallel divides by the number of processes
        for i in range(self.accumulation):
            part = self.world.rank * self.accumulation + i
            share = self.batches.share(pairs, part, self.parts)
            batch = self.data.batch(share, self.packed, self.model.config.pad_id)
            source, target = (side.to(self.world.device) for side in batch)
            torch.manual_seed(_seed(self.seed, update, part))
            is_last, shared = i == self.accumulation - 1, self.shared_loss
            with shared.no_sync() if isinstance(shared, DistributedDataParallel) and not is_last else nullcontext():
                with self.autocast():
                    loss, nll, _ = shared(source, target)
                self.scaler.scale(loss * factor).backward()
            sums += torch.stack([loss.detach(), nll])
        return sums

    def _check(self, update: int, pairs: NDArray[np.int64], loss: float, norm: float, loss_scale: float) -> bool:
        """Whether the gradient can be applied; raises where it cannot and no smaller loss scale would help."""
        if math.isfinite(loss) and math.isfinite(norm):
            return True
        if math.isfinite(loss) and self.scaler.is_enabled() and loss_scale > _LEAST_LOSS_SCALE:
            return False
        tensors = [] if math.isfinite(loss) else ["loss"]
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                tensors.append(name)
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                tensors.append(f"gradient of {name}")
        raise NonFiniteError(update, pairs.tolist(), tensors or ["norm of the gradient"])


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
