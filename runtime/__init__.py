"""What runs a converted model: sessions in torch, onnxruntime and TensorRT, their caches, and text from them."""
