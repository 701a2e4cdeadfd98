#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: every test that needs one, then timings into benchmarks/results/<gpu>/.
nvidia-smi --list-gpus >/dev/null 2>&1 || {
    echo "make gpu: nvidia-smi lists no GPU here; nothing was done" >&2
    exit 1
}
source "$(dirname "$0")/env.sh"
python -m fastattn.info || echo "make gpu: see the problems above; the tests say what works" >&2
pytest -m gpu
python -m benchmarks.torch_backends
