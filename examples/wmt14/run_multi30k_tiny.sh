#!/usr/bin/env bash
# Transformer-Tiny (Wu et al., 2021) on Multi30k, English to German, test_2016: 41.0 lower-cased and tokenised.
# Options are passed on to train, such as --precision bf16 or --accumulate 4; GPUS=8 trains on eight GPUs.
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:-data/multi30k_tiny} RUN=${RUN:-runs/multi30k_tiny}

python -m examples.wmt14.prepare --preparation multi30k_tiny --out "$DATA"
torchrun --standalone --nproc-per-node "${GPUS:-1}" -m examples.wmt14.train \
    --config multi30k_tiny --data "$DATA" --out "$RUN" --resume auto "$@"
python -m examples.wmt14.average "$RUN" --last 10 --output "$RUN/averaged.pt"
python -m examples.wmt14.translate "$RUN/averaged.pt" --data "$DATA" --split test --output "$RUN/test.txt" \
    --beam 5 --alpha 1 --length-penalty length
python -m examples.wmt14.score "$RUN/test.txt" --data "$DATA" --split test
