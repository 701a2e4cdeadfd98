#!/usr/bin/env bash
# A small model on Multi30k, English to German, test_2016: 12 minutes of one CPU core that computes bf16 (AVX512_BF16).
# Options are passed on to train; on other CPUs, and GPUs before A100, --precision fp32 is faster.
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:-data/multi30k_fast} RUN=${RUN:-runs/multi30k_fast}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

python -m examples.wmt14.prepare --preparation multi30k_fast --out "$DATA"
python -m examples.wmt14.train --config multi30k_fast --data "$DATA" --out "$RUN" --resume auto "$@"
python -m examples.wmt14.average "$RUN" --last 5 --output "$RUN/averaged.pt"
python -m examples.wmt14.translate "$RUN/averaged.pt" --data "$DATA" --split test --output "$RUN/test.txt"
python -m examples.wmt14.score "$RUN/test.txt" --data "$DATA" --split test
