"""mla2dsa: turn dense Multi-head Latent Attention (MLA) checkpoints into DeepSeek Sparse Attention (DSA) checkpoints.

Import-light on purpose: the command line answers `--help` without torch, and pytest may import this file twice.
"""

__version__ = "0.1.0"
