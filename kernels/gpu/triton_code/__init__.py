"""Triton kernels, each readable alone."""
