"""Where things lie in the repository, for tests that read or run them."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny-mla"
HELPERS = ROOT / "tests" / "helpers"
NATIVE = (
    ROOT / "tests" / "exporters" / "tensorrt_plugin" / "native"
)  # C++ of the tests: harness, mock driver, stand-ins
ROOMS = ("commands", "compat", "exporters", "files", "kernels", "optimizer", "passes", "runtime", "serving")


def package_files() -> list[Path]:
    """Every file of the package, from the root on."""
    files = [
        *(file for file in ROOT.glob("*.py") if file.name != "setup.py"),
        *(file for room in ROOMS for file in (ROOT / room).rglob("*.py")),
    ]
    return sorted(file.relative_to(ROOT) for file in files)
