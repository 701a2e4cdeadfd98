#!/usr/bin/env bash
# Says what the system lacks for the set-up, as the one apt line that installs it, and fails if anything is missing.
set -euo pipefail
python=${PYTHON:-python3}

have() { command -v "$1" >/dev/null 2>&1; }
says() { "$python" -c "$1" >/dev/null 2>&1; }

missing=()
have "$python" || missing+=(python3)
says 'import ensurepip, venv' || missing+=(python3-venv)
says 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))' || missing+=(python3-dev)
have g++ || missing+=(g++)
have make || missing+=(make)
if ((${#missing[@]})); then
    echo "The set-up needs packages that are not installed. Install them with:" >&2
    echo "    sudo apt-get install -y ${missing[*]}" >&2
    exit 1
fi

if ! says 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "fastattn needs Python >= 3.10, but $python is $("$python" -V 2>&1). Name a newer one, for example:" >&2
    echo "    make test PYTHON=python3.12" >&2
    exit 1
fi
