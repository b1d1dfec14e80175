"""Out of PyTorch: DSA checkpoints and where tensors lie in files."""
