"""Kernels compiled ahead of time: cubins, packs, bundles."""
