#!/usr/bin/env bash
# Writes docs/p100_report.md and .csv: what the sm_60 kernels of this build are predicted to do on a P100, and without
# arguments docs/p100_training.md, a training step. It downloads nvdisasm once; FASTATTN_NVDISASM names another one.
source "$(dirname "$0")/env.sh"
export OMP_NUM_THREADS=1
python -m benchmarks.p100.kernel_report "$@"
if [ $# -eq 0 ]; then
    python -m benchmarks.p100.training_report
fi
