#!/usr/bin/env bash
# A small model on any English-German text: TEXT is a folder with {train,valid,test}.{en,de}.
#   TEXT=text examples/wmt14/run_small_en_de.sh
# Options are passed on to train, such as --precision bf16 or --accumulate 4; GPUS=8 trains on eight GPUs.
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:-data/small_en_de} RUN=${RUN:-runs/small_en_de}

python -m examples.wmt14.prepare --preparation small_en_de --out "$DATA" \
    --train-source "$TEXT/train.en" --train-target "$TEXT/train.de" \
    --valid-source "$TEXT/valid.en" --valid-target "$TEXT/valid.de" \
    --test-source "$TEXT/test.en" --test-target "$TEXT/test.de"
torchrun --standalone --nproc-per-node "${GPUS:-1}" -m examples.wmt14.train \
    --config small_en_de --data "$DATA" --out "$RUN" --resume auto "$@"
python -m examples.wmt14.average "$RUN" --last 5 --output "$RUN/averaged.pt"
python -m examples.wmt14.translate "$RUN/averaged.pt" --data "$DATA" --split test --output "$RUN/test.txt"
python -m examples.wmt14.score "$RUN/test.txt" --data "$DATA" --split test
