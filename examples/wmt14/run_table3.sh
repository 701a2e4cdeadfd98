#!/usr/bin/env bash
# The rows of Table 3, one after the other, on newstest2013: no averaging. Arguments are rows, all by default:
#   GPUS=8 examples/wmt14/run_table3.sh "A h=1" "E learned"
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:-data/wmt14_en_de} RUNS=${RUNS:-runs/table3}
if [[ $# == 0 ]]; then
    set -- base "A h=1" "A h=4" "A h=16" "A h=32" "B dk=16" "B dk=32" "C N=2" "C N=4" "C N=8" "C d=256" "C d=1024" \
        "C dff=1024" "C dff=4096" "D dropout=0.0" "D dropout=0.2" "D smoothing=0.0" "D smoothing=0.2" "E learned" big
fi

python -m examples.wmt14.prepare --preparation wmt14_en_de --out "$DATA"
for row in "$@"; do
    run=$RUNS/${row// /_}
    torchrun --standalone --nproc-per-node "${GPUS:-1}" -m examples.wmt14.train \
        --config "table3 $row" --data "$DATA" --out "$run" --resume auto
    python -m examples.wmt14.average "$run" --last 1 --output "$run/averaged.pt"
    python -m examples.wmt14.translate "$run/averaged.pt" --data "$DATA" --split valid --output "$run/valid.txt"
    echo "Table 3, $row:"
    python -m examples.wmt14.score "$run/valid.txt" --data "$DATA" --split valid
done
