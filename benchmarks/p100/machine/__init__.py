"""What executes sm_60 machine code on the CPU, one instruction after the other."""
