"""How sessions feed a model: what engines are built for, and what every runtime asks for."""

FIRST_CAPACITY = 256  # slots of a cache at first
PREFILL_CHUNK = 512  # tokens of a prompt that go through the model at once
