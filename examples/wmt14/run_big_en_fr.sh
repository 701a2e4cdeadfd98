#!/usr/bin/env bash
# Big model, English to French, newstest2014: Table 2 has 41.8.
# Options are passed on to train, such as --precision bf16 or --accumulate 4; GPUS=8 trains on eight GPUs.
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:-data/wmt14_en_fr} RUN=${RUN:-runs/big_en_fr}

python -m examples.wmt14.prepare --preparation wmt14_en_fr --out "$DATA"
torchrun --standalone --nproc-per-node "${GPUS:-1}" -m examples.wmt14.train \
    --config big_en_fr --data "$DATA" --out "$RUN" --resume auto "$@"
python -m examples.wmt14.average "$RUN" --last 20 --output "$RUN/averaged.pt"
python -m examples.wmt14.translate "$RUN/averaged.pt" --data "$DATA" --split test --output "$RUN/test.txt"
python -m examples.wmt14.score "$RUN/test.txt" --data "$DATA" --split test
