"""The ops on a GPU: Triton kernels, and what it takes to launch them or to compile them ahead of time."""
