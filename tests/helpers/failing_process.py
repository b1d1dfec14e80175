"""`python failing_process.py RANK LAYER convert ...`, started by torchrun: one process fails where it fits that layer."""

import os
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]


def _fail_at(layer: str) -> None:
    from mla2dsa.errors import UserError
    from mla2dsa.optimizer.indexer import calibrate

    fit = calibrate._fit

    def failing(site: Any, *arguments: Any) -> Any:
        if site.name == layer:
            raise UserError("does not converge")
        return fit(site, *arguments)

    calibrate._fit = failing


if __name__ == "__main__":
    rank, layer, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        _fail_at(layer)
    from mla2dsa.cli import main

    sys.exit(main(arguments))
