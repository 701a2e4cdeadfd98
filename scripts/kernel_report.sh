#!/usr/bin/env bash
# Writes docs/p100_report.md and .csv: what the sm_60 kernels of this build are predicted to do on a P100. It downloads
# nvdisasm once; FASTATTN_NVDISASM names another one.
source "$(dirname "$0")/env.sh"
export OMP_NUM_THREADS=1
exec python -m benchmarks.p100_model "$@"
