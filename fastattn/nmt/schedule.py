"""Learning rates: the paper's (linear warm-up, then the inverse square root of the step), and a linear one."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def noam_learning_rate(step: int, d_model: int, warmup_steps: int = 4000, factor: float = 1.0) -> float:
    """Learning rate of one optimiser step, factor * d_model^-0.5 * min(step^-0.5, step * warmup_steps^-1.5).

    Args:
        step: number of the optimiser step, from 1.
        d_model: width of the model.
        warmup_steps: step at which the rate peaks, at factor / sqrt(d_model * warmup_steps).
        factor: 1 in the paper.

    Raises:
        ValueError: `step`, `d_model` or `warmup_steps` is below 1.

    Source: "Attention Is All You Need", section 5.3, equation 3.
    """
    for name, value in (("step", step), ("d_model", d_model), ("warmup_steps", warmup_steps)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    return factor * d_model**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)


def noam_schedule(optimizer: Optimizer, d_model: int, warmup_steps: int = 4000, factor: float = 1.0) -> LambdaLR:
    """Scheduler that sets `noam_learning_rate`; call `step()` after every optimiser step.

    Args:
        optimizer: built with `lr=1`, since a `LambdaLR` multiplies the optimiser's own rate.
        d_model, warmup_steps, factor: as in `noam_learning_rate`.

    Raises:
        ValueError: the optimiser's own rate is not 1.
    """
    for group in optimizer.param_groups:
        own_rate = group.get("initial_lr", group["lr"])
        if own_rate != 1.0:
            raise ValueError(f"optimizer: its own learning rate must be 1, got {own_rate}")
    return LambdaLR(optimizer, lambda done: noam_learning_rate(done + 1, d_model, warmup_steps, factor))


def linear_learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of one optimiser step: linear up to `peak` at `warmup_steps`, then linear to 0 after `total_steps`.

    Args:
        step: number of the optimiser step, from 1; 0.0 is returned beyond `total_steps`.
        peak: greatest learning rate.
        warmup_steps: step at which the rate peaks.
        total_steps: last step with a positive rate.

    Raises:
        ValueError: `step` or `warmup_steps` is below 1, or `total_steps` below `warmup_steps`.
    """
    for name, value in (("step", step), ("warmup_steps", warmup_steps)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    if total_steps < warmup_steps:
        raise ValueError(f"total_steps: must be at least warmup_steps {warmup_steps}, got {total_steps}")
    if step <= warmup_steps:
        return peak * step / warmup_steps
    return peak * max(0.0, (total_steps + 1 - step) / (total_steps + 1 - warmup_steps))
