"""TensorRT engines: plugin fields, building, layers, cache, and what serves them."""
