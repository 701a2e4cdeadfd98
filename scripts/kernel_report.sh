#!/usr/bin/env bash
# Writes docs/p100_report.md and .csv: what the sm_60 kernels of this build are predicted to do on a P100. Without
# arguments, it first calibrates the model on public kernels (docs/p100_calibration.md and .csv) and at last writes
# docs/p100_training.md, a training step, and docs/volta_report.md and .csv, the forward on a V100, a T4 and an A100. It
# downloads nvdisasm and the public kernels once; without these, the committed calibration stays. FASTATTN_NVDISASM names
# another nvdisasm.
export FASTATTN_CUDA_ARCHS=${FASTATTN_CUDA_ARCHS:-all}
source "$(dirname "$0")/env.sh"
export OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then
    python -m benchmarks.p100.calibration
fi
python -m benchmarks.p100.kernel_report "$@"
if [ $# -eq 0 ]; then
    python -m benchmarks.p100.training_report
    python -m benchmarks.volta.report
fi
