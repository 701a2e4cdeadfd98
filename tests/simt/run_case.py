"""Runs one case of the contract on the CUDA kernels, on the CPU, and says what is wrong with it.

    python -m tests.simt.run_case "dtype=float16,mask=padding,seqlens=17x63" --checked
    python -m tests.simt.run_case "packed=True,dropout_p=0.3" --ptx compute_60 --checked --schedule reversed

A case is written as in the names of the tests. What is found is listed with the lines of the CUDA sources.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.simt.attention import PtxKernels, SourceKernels, on_the_cpu
from tests.support.cases import Case
from tests.support.contract import check


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", type=Case.parse, help="fields that differ from the default, name=value,...")
    parser.add_argument("--ptx", metavar="ARCH", help="run the PTX that NVRTC emits for it, such as compute_60")
    parser.add_argument("--checked", action="store_true", help="judge every memory access")
    parser.add_argument("--schedule", default="in-order", help='order of threads: "in-order", "reversed" or a seed')
    parser.add_argument("--split", action="store_true", help="the backward in two kernels, as on an empty card")
    options = parser.parse_args()
    kernels = PtxKernels(options.ptx, options.checked) if options.ptx else SourceKernels(options.checked)
    schedule = int(options.schedule) if options.schedule.isdigit() else options.schedule
    start = time.perf_counter()
    try:
        with on_the_cpu(kernels, schedule=schedule, multiprocessors=1000 if options.split else 1):
            check(options.case)
    except AssertionError as error:  # of the comparison, or of the executor
        print(error, file=sys.stderr)
        return 1
    print(f"{options.case}: out, lse and all gradients are right ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
