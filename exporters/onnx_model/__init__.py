"""The ONNX file: translation, local functions, mixture of experts, external data."""
