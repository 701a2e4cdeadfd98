"""What predicts the cards from Volta on without them: machine code of V100, T4 and A100, replayed on a cycle model.

The machine code is not executed, as that of the P100 is (`benchmarks.p100`), but walked along its loops.
"""
