"""The reports of a run: `log.jsonl` and TensorBoard in its folder, and a progress bar."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .trainer import Step

LOG = "log.jsonl"


def read_log(run: Path) -> list[dict[str, Any]]:
    """The records of a run; a last line that was cut off is left out."""
    lines = (run / LOG).read_bytes().split(b"\n")[:-1] if (run / LOG).exists() else []
    return [json.loads(line) for line in lines]


def _keep_records_until(run: Path, update: int) -> None:
    """Drop the records after the checkpoint from which a run goes on: those updates are made again."""
    kept = [json.dumps(record) + "\n" for record in read_log(run) if record["update"] <= update]
    partial = run / f".{LOG}"
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(run / LOG)


def _summary_writer(folder: Path, update: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed: the curves are in log.jsonl only.", file=sys.stderr)
        return None
    return SummaryWriter(str(folder), purge_step=update + 1)


class Clock:
    """The cost of a run over all its restarts: seconds, CPU seconds of this process, tokens."""

    def __init__(self, seconds: float = 0.0, cpu_seconds: float = 0.0, target_tokens_seen: int = 0) -> None:
        self.target_tokens_seen = target_tokens_seen
        self._wall, self._cpu = time.perf_counter() - seconds, time.process_time() - cpu_seconds

    def state_dict(self) -> dict[str, Any]:
        """Arguments of the clock that goes on from here."""
        return {
            "seconds": time.perf_counter() - self._wall,
            "cpu_seconds": time.process_time() - self._cpu,
            "target_tokens_seen": self.target_tokens_seen,
        }


class Progress:
    """Log, TensorBoard and progress bar of the main process; in the others it writes nothing.

    Args:
        run: folder of the run.
        update: updates made before.
        updates: updates at the end of the run.
        clock: of the run.
        device: of this process.
        peak: FLOP/s of all devices together, or None.
        log_every: updates between two records.
        is_main: write at all.
    """

    def __init__(
        self, run: Path, update: int, updates: int, clock: Clock, device: torch.device, peak: float | None,
        log_every: int, is_main: bool,
    ) -> None:  # fmt: skip
        self.clock, self.device, self.peak, self.log_every, self.is_main = clock, device, peak, log_every, is_main
        self._tokens, self._flops, self._since = 0, 0.0, time.perf_counter()
        if not is_main:
            return
        run.mkdir(parents=True, exist_ok=True)
        _keep_records_until(run, update)
        self._file = (run / LOG).open("a", encoding="utf-8")
        self._writer = _summary_writer(run / "tensorboard", update)
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=updates, initial=update, desc="training", unit="update", mininterval=interval, smoothing=0.05
        )

    def step(self, update: int, epoch: int, step: Step, flops: float) -> None:
        """Count an update; every `log_every` updates, write a record."""
        self.clock.target_tokens_seen += step.target_tokens
        self._tokens += step.target_tokens
        self._flops += flops
        if not self.is_main:
            return
        self._bar.update()
        if update % self.log_every:
            return
        speed = self._speed()
        self.write("update", update, {"epoch": epoch, **_shown(step), **speed, **self.clock.state_dict()})
        tflops = f"{speed['tflops']:.2f} TFLOP/s"
        tflops += f" ({speed['peak_share']:.0%} of peak)" if "peak_share" in speed else ""
        tflops += f", {speed['gpu_memory_gb']:.1f} GB" if "gpu_memory_gb" in speed else ""
        self._bar.set_postfix_str(
            f"{speed['tokens_per_second']:,.0f} tokens/s, {tflops}, nll {step.nll:.3f}, lr {step.learning_rate:.1e}",
            refresh=False,
        )

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A context whose time does not count in the tokens per second."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def validation(self, update: int, record: dict[str, Any]) -> None:
        """Write the record of a validation, and print its scores."""
        self.write("validation", update, {**record, **self.clock.state_dict()})
        if self.is_main:
            bleu = f", BLEU {record['bleu']:.2f}" if "bleu" in record else ""
            self._bar.write(f"update {update}: validation nll {record['nll']:.4f}{bleu}", file=sys.stderr)

    def write(self, event: str, update: int, values: dict[str, Any]) -> None:
        """Write one record to the log, and its numbers to TensorBoard."""
        if not self.is_main:
            return
        self._file.write(json.dumps({"event": event, "update": update, **values}) + "\n")
        self._file.flush()
        if self._writer:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{event}/{name}", value, update)

    def close(self) -> None:
        """Close log, TensorBoard and progress bar."""
        if self.is_main:
            self._bar.close()
            self._file.close()
            if self._writer:
                self._writer.close()

    def _speed(self) -> dict[str, float]:
        now = time.perf_counter()
        seconds, tokens, flops = now - self._since, self._tokens, self._flops
        self._tokens, self._flops, self._since = 0, 0.0, now
        speed = {"tokens_per_second": tokens / seconds, "tflops": flops / seconds / 1e12}
        if self.peak:
            speed["peak_share"] = flops / seconds / self.peak
        if self.device.type == "cuda":
            speed["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        return speed


def _shown(step: Step) -> dict[str, Any]:
    return {name: value for name, value in vars(step).items() if name != "stop"}
