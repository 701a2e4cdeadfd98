"""Trains one of the models of `configs` on a prepared data folder.

    python -m examples.wmt14.train --config multi30k_fast --data DATA --out RUN --resume auto
    torchrun --nproc-per-node 8 -m examples.wmt14.train --config base_en_de --data DATA --out RUN --resume auto

RUN holds config.json, log.jsonl, tensorboard/ and checkpoints/. SIGTERM and Ctrl-C finish the update under way, write a
checkpoint and exit with 128 + the signal's number; the same command goes on from the newest checkpoint, and so it does
after a crash: as if nothing had happened, to the bit where the same processes do the same operations (tested on the
CPU). Several machines need a file system they share. A loss or gradient that is not finite ends the run with code 4.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported: idle threads sleep

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from .configs import CONFIGS, Config
from .distributed import World
from .estimate import print_estimate
from .options import positive_int
from .run import Run
from .subwords import Subwords
from .trainer import NonFiniteError

NON_FINITE = 4  # exit code
_OVERRIDES = ("updates", "tokens_per_update", "precision", "save_every", "validate_every", "keep_last", "patience")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="train", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    rows = [name for name in CONFIGS if not name.startswith("table3 ")]
    table3 = [name.removeprefix("table3 ") for name in CONFIGS if name.startswith("table3 ")]
    names = f"one of: {', '.join(rows)}; or 'table3 ROW', ROW one of: {', '.join(table3)}"
    add("--config", required=True, metavar="NAME", help=names)
    add("--data", type=Path, metavar="FOLDER", help="what prepare wrote; needed but for --dry-run")
    add("--out", type=Path, metavar="RUN", help="where checkpoints and logs go; needed but for --dry-run")
    add("--resume", choices=["auto"], help="go on from RUN's newest checkpoint, or start if there is none")
    add("--dry-run", action="store_true", help="print sizes, memory, FLOPs and predicted hours per GPU, and stop")
    add("--device", help="cpu, cuda, cuda:1 ... (default: this process's own GPU, or the CPU where there is none)")
    add("--seed", type=int, default=1, help="of the model, the order of the data and dropout (default 1)")
    accumulate = "steps in which every process computes its share of an update; more need less memory (default 1)"
    add("--accumulate", type=positive_int, default=1, metavar="STEPS", help=accumulate)
    batches = "without padding or with it (default: packed, but padded on a CPU without fused kernels)"
    add("--batches", choices=["packed", "padded"], help=batches)
    add("--checkpoint-activations", action="store_true", help="compute activations twice: less memory, more time")
    add("--log-every", type=positive_int, default=50, metavar="UPDATES", help="between two records (default 50)")
    bleu = "sentences of the validation set to translate at every validation; 0 for none (default 200)"
    add("--bleu-sentences", type=int, default=200, metavar="N", help=bleu)
    add("--bleu-beam", type=positive_int, default=1, metavar="N", help="beam of that search (default 1)")
    recipe = parser.add_argument_group("instead of the config's own value")
    recipe.add_argument("--updates", type=positive_int, help="optimiser steps")
    recipe.add_argument("--tokens-per-update", type=positive_int, metavar="N", help="most ids of a side")
    recipe.add_argument("--precision", choices=["fp32", "fp16", "bf16"], help="of matrix products and attention")
    recipe.add_argument("--save-every", type=positive_int, metavar="UPDATES", help="between two checkpoints")
    recipe.add_argument("--validate-every", type=positive_int, metavar="UPDATES", help="between two validations")
    recipe.add_argument("--keep-last", type=positive_int, metavar="N", help="checkpoints kept")
    recipe.add_argument("--patience", type=positive_int, metavar="N", help="validations without a lower nll, then stop")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parse_arguments(arguments)
    try:
        config = chosen_config(args)
        if args.dry_run:
            print_estimate(config, Subwords.load(args.data).vocab_size if args.data else config.transformer.vocab_size)
            return 0
        world = World.join(args.device)
        code = Run(config, args, world).train()
        world.leave()
        return code
    except NonFiniteError as error:
        print(f"train: {error}", file=sys.stderr)
        return NON_FINITE
    except (ValueError, OSError) as error:
        sys.exit(f"train: {error}")


def chosen_config(args: argparse.Namespace) -> Config:
    """The named recipe with the values given instead of its own.

    Raises:
        ValueError: there is none of that name, or no folder for the data or the run.
    """
    if args.config not in CONFIGS:
        raise ValueError(f"--config: must be one of {', '.join(CONFIGS)}, got {args.config!r}")
    for name in ("data", "out"):
        if getattr(args, name) is None and not args.dry_run:
            raise ValueError(f"--{name}: must be given to train")
    return replace(
        CONFIGS[args.config], **{name: value for name in _OVERRIDES if (value := getattr(args, name)) is not None}
    )


if __name__ == "__main__":
    sys.exit(main())
