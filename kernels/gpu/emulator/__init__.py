"""Triton's interpreter with the arithmetic of the hardware, for tests."""
