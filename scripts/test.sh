#!/usr/bin/env bash
# Runs pytest on every core, one torch thread each; takes pytest's options. What each part took comes last.
export FASTATTN_CUDA_ARCHS=${FASTATTN_CUDA_ARCHS:-all} # they look at every architecture
source "$(dirname "$0")/env.sh"
workers=$(env -u OMP_NUM_THREADS nproc)
export OMP_NUM_THREADS=1
exec pytest --numprocesses "$workers" --clock="$FASTATTN_VENV/seconds" "$@"
