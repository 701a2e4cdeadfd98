#!/usr/bin/env bash
# Runs tests on the oldest Python and torch that fastattn takes, in a .venv-floor beside .venv; takes pytest's options.
# The torch is the CPU's, of 200 MB, not the default one of gigabytes: what CUDA needs of a GPU is tested by make gpu.
python=${PYTHON:-python3.10}
if ! found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
    echo "make test-floor: needs Python 3.10, and $python is not here or does not start. Name one, for example:" >&2
    echo "    make test-floor PYTHON=/opt/python3.10/bin/python3" >&2
    exit 1
elif [[ "$found" != 3.10 ]]; then
    echo "make test-floor: needs Python 3.10, the oldest that fastattn takes, but $python is Python $found" >&2
    exit 1
fi
export FASTATTN_VENV=.venv-floor PYTHON=$python
export TORCH=${TORCH:-torch==2.7.1 --index-url https://download.pytorch.org/whl/cpu}
exec "$(dirname "$0")/test.sh" "$@"
