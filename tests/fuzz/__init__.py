"""Random calls of every public op and module, legal and not, against stock PyTorch.

A property takes a case, which hypothesis draws and shrinks. `tests/test_fuzz.py` runs a few cases of each, always the
same; `make fuzz` (`python -m tests.fuzz`) runs as many as asked for, and goes on where it was stopped.
"""
