"""Out of PyTorch: DSA checkpoints, ONNX models, TensorRT engines."""
