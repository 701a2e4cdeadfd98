#!/usr/bin/env bash
# One row of the tables, from raw text to scores:
#
#   examples/wmt14/run.sh ROW [--dry-run] [OPTION ...]
#
# ROW is a key of CONFIGS in configs.py, such as base_en_de or "table3 A h=1"; table3 stands for all rows of Table 3, one
# after the other. --dry-run only prints the commands. OPTIONs are those of train, such as --precision bf16.
#
#   GPUS=8        trains on eight GPUs
#   TEXT=FOLDER   holds {train,valid,test}.{en,de} to take in place of downloads
#   DATA=FOLDER   the prepared data (default data/PREPARATION)
#   RUN=FOLDER    the run (default runs/ROW); for table3, the folder of its runs
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ $# == 0 ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' examples/wmt14/run.sh >&2
    exit 2
fi
wanted=$1 is_dry=false
shift
if [[ ${1:-} == --dry-run ]]; then
    is_dry=true
    shift
fi

step() {
    printf '\n$'
    printf ' %q' "$@"
    echo
    $is_dry || "$@"
}

run_row() {
    local row=$1 preparation=$2 source=$3 target=$4 split=test launch=(python) text=() name
    shift 4
    local folder=${row// /_} data=${DATA:-data/$preparation}
    folder=${folder/#table3_/table3/}
    local run=${RUN:-runs/$folder}
    [[ $wanted != table3 ]] || run=${RUN:-runs/table3}/${folder#table3/}
    [[ $row != "table3 "* ]] || split=valid  # newstest2013, as in the paper
    [[ ${GPUS:-1} == 1 ]] || launch=(torchrun --standalone --nproc-per-node "$GPUS")
    if [[ -n ${TEXT:-} ]]; then
        for name in train valid test; do
            text+=("--$name-source" "$TEXT/$name.$source" "--$name-target" "$TEXT/$name.$target")
        done
    fi

    step python -m examples.wmt14.prepare --preparation "$preparation" --out "$data" "${text[@]}"
    step "${launch[@]}" -m examples.wmt14.train --config "$row" --data "$data" --out "$run" --resume auto "$@"
    step python -m examples.wmt14.average "$run" --output "$run/averaged.pt"
    step python -m examples.wmt14.translate "$run/averaged.pt" --data "$data" --split $split --output "$run/$split.txt"
    step python -m examples.wmt14.score "$run/$split.txt" --data "$data" --split $split
}

rows=$(python - "$wanted" <<'END'
import sys

from examples.wmt14.configs import CONFIGS

wanted = sys.argv[1]
rows = [name for name in CONFIGS if name == wanted or (wanted == "table3" and name.startswith("table3 "))]
if not rows:
    sys.exit(f"run.sh: ROW must be table3 or one of {', '.join(CONFIGS)}, got {wanted!r}")
for name in rows:
    config = CONFIGS[name]
    print(name, config.preparation, config.source, config.target, sep="\t")
END
)
while IFS=$'\t' read -r -u 3 row preparation source target; do
    run_row "$row" "$preparation" "$source" "$target" "$@"
done 3<<< "$rows"
