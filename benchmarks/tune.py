"""Measures which tiles the Triton kernels should take on this GPU, and writes them into the table they choose from.

    python -m benchmarks.tune                      every row, more than an hour
    python -m benchmarks.tune --quick              the rows that matter most, two minutes
    python -m benchmarks.tune --filter fwd float16 only rows with a word for each of these
    python -m benchmarks.tune --dry-run            what would be measured, on any machine

Every candidate first computes attention next to the float64 reference, in processes of their own on all processor
cores, because compiling takes longest; one that is wrong or that the GPU cannot run is a line with the reason. The
others are then timed one after the other. The fastest of each row goes into fastattn/triton_kernels/tiles.csv, for GPUs
of this capability; all measurements go into tune.csv and tune.json.
"""

from __future__ import annotations

import sys
import time

import torch

from benchmarks.command import Command, has_packages, parser
from fastattn import backends


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; returns the exit status."""
    start = time.monotonic()
    line = parser("tune", "Measure tiles of the Triton kernels.", ["quick"])
    line.add_argument("--dry-run", action="store_true", help="say what would be measured")
    options = line.parse_args(arguments)
    if missing := backends.get("triton").why_missing():
        print(f"the triton backend {missing}; nothing was measured", file=sys.stderr)
        return 1
    from benchmarks.tile_candidates import choose_keys, safe_tiles
    from fastattn.triton_kernels import tiles

    wanted = choose_keys(safe_tiles(tiles.table()), options.size == "quick", options.filter)
    if options.dry_run or not wanted:
        for key, candidates in wanted.items():
            print(f"{key}: {len(candidates)} tiles")
        print(f"{len(wanted)} rows, {sum(map(len, wanted.values()))} tiles")
        return 0 if wanted else 1
    if not has_packages("numpy", "tqdm"):
        return 1
    from benchmarks.tuning import Trial, fastest, measure_all, updated

    if not torch.cuda.is_available():
        hint = "see python -m fastattn.info; nothing was measured"
        print(f"no CUDA device of capability 8.0 or newer: {hint}", file=sys.stderr)
        return 1
    if torch.cuda.get_device_capability() < (8, 0):
        print("Triton takes GPUs of capability 8.0 and newer: there is nothing to tune here")
        return 0
    command = Command.of(options, torch.device("cuda", torch.cuda.current_device()))
    results = measure_all(wanted, command, Trial(command.device), start)
    best = fastest(results)
    capability = torch.cuda.get_device_capability(command.device)
    tiles.write(tiles.TABLE, updated(tiles.table(), best, capability))
    for key in {result.key for result in results} - set(best):
        print(f"{key}: no candidate gave numbers; it keeps its row", file=sys.stderr)
    print(f"wrote {len(best)} rows of {tiles.TABLE}")
    return 0 if best else 1


if __name__ == "__main__":
    sys.exit(main())
