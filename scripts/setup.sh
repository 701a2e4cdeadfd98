#!/usr/bin/env bash
# Makes .venv: a torch that fits this machine, the pinned tools, and fastattn from this folder (editable), with its CUDA
# and CPU kernels. Returns at once when nothing changed; compiles what changed of the kernels when nothing else did. A
# .venv that is unfinished, moved or for another torch is made anew. FASTATTN_VENV=.venv-NAME makes another one beside it.
# FASTATTN_CUDA_ARCHS=all, which the tests ask for, builds the kernels of every architecture.
set -euo pipefail
cd "$(dirname "$0")/.."
export FASTATTN_VENV=${FASTATTN_VENV:-.venv}
venv=$FASTATTN_VENV
if [[ ! "$venv" =~ ^\.venv[A-Za-z0-9._-]*$ ]]; then # the folder is removed further below
    echo "FASTATTN_VENV: must be a name that begins with .venv, got $venv" >&2
    exit 2
fi
finished=$venv/finished

scripts/prerequisites.sh
# The interpreter behind a virtual environment, which may be the .venv to be replaced.
python=$("${PYTHON:-python3}" -c 'import os, sys; print(os.path.realpath(sys.executable))')
choice=$(scripts/choose_torch.sh)
read -ra torch <<<"${choice%%  \#*}"

kind="$PWD $python $("$python" --version) ${torch[*]}"
files=$(cat requirements-dev.txt pyproject.toml setup.py scripts/setup.sh | sha256sum)
# Who does not say which architectures keeps them all once they are there, and else gets those of this machine's GPUs.
if [[ -z "${FASTATTN_CUDA_ARCHS-}" && -f $finished && "$(tail -n 1 "$finished")" == all ]]; then
    export FASTATTN_CUDA_ARCHS=all
fi
which="${FASTATTN_BUILD_CUDA-} ${FASTATTN_CUDA_ARCHS-} ${FASTATTN_PREBUILT_KERNELS-}"
mapfile -t csrc < <(find csrc -type f | LC_ALL=C sort)
how=(fastattn/cuda_kernels/{gpus,nvrtc,sources}.py fastattn/cpu_kernels/sources.py scripts/build_{native,settings}.py)
kernels=$(echo "$which" | cat - "${csrc[@]}" "${how[@]}" | sha256sum)
last_kind="" last_files="" last_kernels=""
if [[ -f $finished ]]; then { read -r last_kind && read -r last_files && read -r last_kernels; } <"$finished" || true; fi
all=("$kind" "$files" "$kernels")
if [[ "${all[*]}" == "$last_kind $last_files $last_kernels" ]]; then exit 0; fi

compile() {
    local begun=$SECONDS
    "$venv/bin/python" scripts/build_native.py
    kernel_seconds=$((SECONDS - begun))
    scripts/note_seconds.sh kernels $kernel_seconds
}
finish() { printf '%s\n' "${all[@]}" "${FASTATTN_CUDA_ARCHS-}" >"$finished"; }
if [[ "$kind $files" == "$last_kind $last_files" ]]; then
    echo "set-up: the kernels"
    compile
    finish
    exit
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
quiet=(--quiet)
if [[ -t 1 ]]; then quiet=(); fi # a person sees how far the download is

if [[ "$kind" != "$last_kind" ]]; then
    echo "set-up: a new $venv with $choice"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    pip install "${quiet[@]}" "${torch[@]}"
    # torch's CPU builds bring no Triton, but its kernels run on the CPU in Triton's interpreter. 3.7.1 fits torch 2.13.
    packages=$(pip list --format=freeze)
    if [[ "$(uname -sm)" == "Linux x86_64" && "$packages" == *torch==2.13.* && "$packages" != *triton==* ]]; then
        pip install "${quiet[@]}" triton==3.7.1
    fi
fi
rm -f "$finished"
echo "set-up: the tools of requirements-dev.txt and fastattn"
pip install --quiet -r requirements-dev.txt
compile # pip would do it, too, but show nothing for minutes
pip install --quiet --no-deps --no-build-isolation --editable .
finish
scripts/note_seconds.sh set-up $((SECONDS - kernel_seconds))
