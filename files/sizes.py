"""How sessions feed a model: what engines are built for, and what every runtime asks for."""

FIRST_CAPACITY = 256  # slots of a cache at first
PREFILL_CHUNK = 512  # tokens of a prompt that go through the model at once
# As many keys as DeepSeek's index_topk: what is made of the latents for dense attention up to there serves as many queries.
TORCH_CHUNK = 2048  # the same of torch sessions, whose attention takes queries in parts
