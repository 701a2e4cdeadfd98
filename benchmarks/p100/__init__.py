"""Predictions for the P100 without one: its machine code is executed on the CPU and replayed through a cycle model.

Upwards: `machine` executes blocks; `launches` and `passes` say what a pass of attention launches; `tracing` executes a
few blocks of each launch, with `l2_cache` for what reaches DRAM; `chip`, `static_analysis` and `pipeline` are the cycle
model; `prediction` makes a time of it. `calibration` compares its times with published ones of `public_kernels`, and so
says what to expect of a prediction. It, `kernel_report` (with `quick`, `targets`, `mix`, `sgemm`) and `training_report`
(with `training_step`) are the commands, each beside the template of its page; `page` is what the pages share.
"""
