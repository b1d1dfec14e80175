"""The ops: torch reference, CPU fast path, registration. Kept to this docstring: see `__main__.py` for why."""
