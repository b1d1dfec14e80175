"""Where what was compiled is kept between runs: MLA2DSA_CACHE, else mla2dsa in XDG_CACHE_HOME, else ~/.cache/mla2dsa.

The folder may be removed at any time.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """It need not exist."""
    named = os.environ.get("MLA2DSA_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mla2dsa"
