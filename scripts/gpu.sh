#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: every test that needs one, the tuning, and all benchmarks, with pictures and a summary,
# into benchmarks/results/<gpu>/. Once set up it takes nine minutes at most; with --full every case, for as long as needed.
# A part that fails or runs out of time does not stop the others; a table of the parts comes last.
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

deadline=$((SECONDS + 500)) # the pictures and the summary come after it
parts=()
failed=0

note() { parts+=("$(printf '%-24s %-26s %5s s' "$1" "$2" "$3")"); }

# part NAME SECONDS COMMAND...: runs it, for so long at most in the quick form, and notes how it went.
part() {
    local name=$1 most=$2 begun=$SECONDS status=0 verdict=ok left=$((deadline - SECONDS))
    shift 2
    if [[ $form == --full ]]; then most=86400; elif ((most > left)); then most=$left; fi
    if ((most <= 0)); then
        note "$name" "failed: no time left" 0
        failed=1
        return
    fi
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

if [[ -n "${FASTATTN_PREBUILT_KERNELS:-}" ]]; then part "C++ part" 60 python3 scripts/build_native.py; fi
part environment 30 python3 -m fastattn.info
part "gpu tests" 150 python3 -m pytest -m gpu --numprocesses 4
# The kernels of a P100 on whatever GPU this is: the driver compiles their PTX.
part "gpu tests, compute_60" 80 env FASTATTN_CUDA_IMAGE=compute_60 \
    python3 -m pytest -m gpu --numprocesses 4 tests/cuda/test_gpu.py
benchmark tune 110
benchmark attention 150
benchmark transformer_step 60
benchmark multi_head_attention 20
benchmark layers 30
benchmark decode 30
benchmark overhead 30
benchmark launch_latency 20

first_call='import torch; torch.ones(1, device="cuda").sum().item()'
if ! command -v compute-sanitizer >/dev/null; then
    note compute-sanitizer "left out: not installed" 0
elif ! timeout 30 compute-sanitizer --error-exitcode 1 python3 -c "$first_call" >/dev/null 2>&1; then
    note compute-sanitizer "left out: it fails here" 0
else
    tools=(memcheck racecheck)
    if [[ $form == --full ]]; then tools+=(synccheck initcheck); fi
    for tool in "${tools[@]}"; do
        part "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            python3 -m pytest -q -m gpu tests/cuda/test_gpu.py -k "test_long_rows or test_threads"
    done
fi

deadline=$((SECONDS + 40))
part plot 25 python3 -m benchmarks.plot
part summary 15 python3 -m benchmarks.summary

echo
printf '%s\n' "${parts[@]}"
exit "$failed"
