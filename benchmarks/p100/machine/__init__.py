"""An executor of sm_60 machine code on the CPU: it computes what a kernel computes and records what it executes."""
