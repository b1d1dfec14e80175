"""Bytes on disk: where tensors lie in safetensors files, folders that appear whole or not at all, manifests, dtypes."""
