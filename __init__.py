"""mla2dsa: turn dense Multi-head Latent Attention (MLA) checkpoints into DeepSeek Sparse Attention (DSA) checkpoints.

    import mla2dsa

    print(mla2dsa.plan("./model", index_topk=512))
    done = mla2dsa.convert("./model", "./model-dsa", calibration="./texts")
    mla2dsa.verify("./model", "./model-dsa", text="held-out.txt")
    mla2dsa.compare("./model", "./model-dsa", "def main():")
    mla2dsa.export("./model-dsa", "./model-onnx")
    mla2dsa.build("./model-dsa", "./engine", backend="tensorrt-rtx")

Import-light on purpose: nothing is loaded before one of these names is asked for. The command line answers `--help` without torch, and
pytest may import this file twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import bench, build, compare, convert, export, plan, verify

__version__ = "0.1.0"
__all__ = ["__version__", "bench", "build", "compare", "convert", "export", "plan", "verify"]


def __getattr__(name: str) -> Any:
    """PEP 562."""
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
