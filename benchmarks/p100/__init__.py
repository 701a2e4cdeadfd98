"""A model of the P100 (GP100): executes the machine code of its kernels and replays it through a model of the pipes."""
