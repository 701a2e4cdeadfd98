#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: every test that needs one, all benchmarks and the tuning, with pictures and a summary,
# into benchmarks/results/<gpu>/. Once set up it takes nine minutes at most, which is what the limits of the parts add up
# to, the most valuable part first; with --full every case, for as long as needed. A part that fails or runs out of time
# does not stop the others, and a table of the parts comes last. One is a failure, too, if no test of it ran.
#
# Where there is no network, FASTATTN_PREBUILT_KERNELS=<folder of images> takes the machine's own Python as it is: it has
# torch, pytest with xdist, allpairspy, hypothesis, expecttest, ninja, pybind11, tqdm and matplotlib, and only the
# launcher and the CPU kernels are compiled.
nvidia-smi --list-gpus >/dev/null 2>&1 || {
    echo "make gpu: nvidia-smi lists no GPU here; nothing was done" >&2
    exit 1
}
if [[ "${1-}" != "" && "$1" != --full ]]; then
    echo "make gpu: takes --full or nothing, got $1" >&2
    exit 2
fi
form=${1:---quick}
export FASTATTN_CUDA_ARCHS=${FASTATTN_CUDA_ARCHS:-all} # tests force other images than the GPU's own
if [[ -n "${FASTATTN_PREBUILT_KERNELS:-}" ]]; then
    cd "$(dirname "$0")/.." || exit 1
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
else
    source "$(dirname "$0")/env.sh"
fi
set +e -u

parts=()
failed=0

note() { parts+=("$(printf '%-24s %-26s %5s s' "$1" "$2" "$3")"); }

# part NAME SECONDS COMMAND...: runs it, for so long at most in the quick form, and notes how it went.
part() {
    local name=$1 most=$2 begun=$SECONDS status=0 verdict=ok
    shift 2
    if [[ $form == --full ]]; then most=86400; fi
    echo -e "\n==== $name"
    timeout --kill-after=5 "$most" "$@" || status=$?
    case $status in
    0) ;;
    124 | 137) verdict="failed: stopped after $most s" ;;
    *) verdict="failed: exit status $status" ;;
    esac
    if ((status)); then failed=1; fi
    note "$name" "$verdict" $((SECONDS - begun))
}

# benchmark NAME SECONDS: the module of that name, in the form chosen.
benchmark() {
    local size=()
    if [[ $form == --quick ]]; then size=(--quick); fi
    part "$1" "$2" python3 -m "benchmarks.$1" "${size[@]}"
}

# tests NAME SECONDS FILES...: those for a GPU, whose results are kept as $results/<name>.xml.
tests() {
    local name=$1 most=$2
    shift 2
    part "$name" "$most" python3 -m pytest -m gpu --must-run --numprocesses "$workers" --durations 10 \
        --junitxml "$results/${name//[ ,]/_}.xml" "$@"
}

# query FACT: the least value of all GPUs; nothing where nvidia-smi does not know the fact.
query() { nvidia-smi "--query-gpu=$1" --format=csv,noheader 2>/dev/null | sort -V | head -n 1; }

capability=$(query compute_cap)
is_old=0 # Triton takes none below 8.0
if [[ "$capability" =~ ^([0-9]+)\.[0-9]$ ]] && ((BASH_REMATCH[1] < 8)); then is_old=1; fi
workers=$(nproc)
if ((workers > 12)); then workers=12; fi
# A GPU that lets in one process has no place for the workers' contexts beside pytest's own.
if [[ "$(query compute_mode)" == Exclusive_Process ]]; then workers=0; fi

name_folder='import torch; from benchmarks.command import RESULTS; from benchmarks.provenance import folder_name
print(RESULTS / folder_name(torch.device("cuda", 0)))'
if [[ -n "${FASTATTN_PREBUILT_KERNELS:-}" ]]; then part "C++ part" 20 python3 scripts/build_native.py; fi
results=$(python3 -c "$name_folder") || results=""
results=${results:-benchmarks/results}
mkdir -p "$results"
part environment 15 python3 -m fastattn.info

# Whatever compiles does so on all cores, before anything is timed.
if ((!is_old)); then benchmark warm_up 45; fi
tests "gpu tests" 95
benchmark attention 95
benchmark transformer_step 40
if ((is_old)); then benchmark products 30; fi # four fifths of training there
benchmark overhead 15
benchmark decode 20
benchmark layers 20
benchmark multi_head_attention 15
benchmark launch_latency 10
# The kernels of a P100 on whatever GPU this is: the driver compiles their PTX.
FASTATTN_CUDA_IMAGE=compute_60 tests "gpu tests, compute_60" 25 tests/cuda/test_gpu.py

# torch's kernels are left out, references are computed outside, and each tensor has an allocation of its own: what
# overruns one would otherwise stay within torch's.
first_call='import torch; torch.ones(1, device="cuda").sum().item()'
ours=(--kernel-name kernel_substring=attention_ --error-exitcode 1)
references=$(mktemp)
if ! command -v compute-sanitizer >/dev/null; then
    note compute-sanitizer "left out: not installed" 0
elif ! timeout 10 compute-sanitizer "${ours[@]}" python3 -c "$first_call" >/dev/null 2>&1; then
    note compute-sanitizer "left out: it fails here" 0
else
    part references 10 python3 -m tests.support.sanitized_calls make "$references"
    tools=(memcheck racecheck)
    if [[ $form == --full ]]; then tools+=(synccheck initcheck); fi
    for tool in "${tools[@]}"; do
        part "$tool" 20 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer "${ours[@]}" --tool "$tool" \
            python3 -m tests.support.sanitized_calls run "$references"
    done
fi
rm -f "$references"

if ((!is_old)); then benchmark tune 45; fi
part plot 10 python3 -m benchmarks.plot
part summary 10 python3 -m benchmarks.summary

echo
printf '%s\n' "${parts[@]}"
exit "$failed"
