"""`python -m mla2dsa`: the command line, safe to start from inside the repository."""

import sys
from pathlib import Path

# The repository root holds a folder called `kernels`. With the root on sys.path, transformers would take it for
# Hugging Face's package of that name, and importing any model class would fail.
_ROOT = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]

from .cli import program  # noqa: E402  (the guard has to run first)

if __name__ == "__main__":
    sys.exit(program())
