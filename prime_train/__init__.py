"""The reference training for PRIME, built around prime_kernels.

Each folder is a room with one purpose, said in its `__init__` with the rooms that it may import. The files beside them
may import all: `prime` and `sft` are the training programs, `checks` and `doctor` find what is wrong before a run,
`reference` tells of every key and metric, and `cli` has the commands. `records` is what stages hand each other; it
imports no other module of the trainer.
"""
