"""Where things lie in the repository, for tests that read or run them."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny-mla"
HELPERS = ROOT / "tests" / "helpers"
NATIVE = (
    ROOT / "tests" / "exporters" / "tensorrt_plugin" / "native"
)  # C++ of the tests: harness, mock driver, stand-ins
