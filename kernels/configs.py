"""Block sizes and warps of every kernel, in one place: chosen by shape, never timed at run time.

Timing kernels while training would let noise decide how a run computes. These are constants: set
by counting registers and instructions for now, and by `bench/gpu.py --stage tune` where a GPU has
been measured; docs/kernels.md says which.
"""
