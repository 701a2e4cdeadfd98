#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: every test that needs one, then timings into benchmarks/results/<gpu>/.
#
# Where there is no network, FASTATTN_PREBUILT_KERNELS=<folder of images> takes the machine's own Python as it is: it has
# torch, pytest, allpairspy, hypothesis, tqdm, ninja and pybind11, and only the launcher is compiled.
nvidia-smi --list-gpus >/dev/null 2>&1 || {
    echo "make gpu: nvidia-smi lists no GPU here; nothing was done" >&2
    exit 1
}
if [[ -n "${FASTATTN_PREBUILT_KERNELS:-}" ]]; then
    set -euo pipefail
    cd "$(dirname "$0")/.."
    python3 scripts/build_native.py
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
else
    source "$(dirname "$0")/env.sh"
fi
python3 -m fastattn.info || echo "make gpu: see the problems above; the tests say what works" >&2

# Every part runs, whatever becomes of those before it; the status says whether all went well.
status=0
part() {
    env "$@" || {
        echo "make gpu: failed: $*" >&2
        status=1
    }
}
part python3 -m pytest -m gpu
# The kernels of a P100 on whatever GPU this is: the driver compiles their PTX.
part FASTATTN_CUDA_IMAGE=compute_60 python3 -m pytest -m gpu tests/test_cuda_gpu.py
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck initcheck; do
        part compute-sanitizer --tool "$tool" --error-exitcode 1 \
            python3 -m pytest -q -m gpu tests/test_cuda_gpu.py -k "test_long_rows or test_threads"
    done
else
    echo "make gpu: no compute-sanitizer here; that part was left out" >&2
fi
part python3 -m benchmarks.tune --quick
part python3 -m benchmarks.torch_backends
exit $status
