"""Folders as mla2dsa writes them, small: for tests of who may replace what."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from mla2dsa.files.ownership import write_manifest
from mla2dsa.files.staging import staged_folder

MANIFEST = "mla2dsa.json"


def publish(
    out: Path,
    content: str = "new",
    *inputs: Path,
    overwrite: bool = False,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """A folder with two files and a manifest becomes `out`. meanwhile: what somebody else does before the end."""
    with staged_folder(out, inputs, overwrite=overwrite) as folder:
        (folder / "config.json").write_text(content)
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_text(content)
        write_manifest(folder, MANIFEST, {"format": 1})
        meanwhile()


def tree(folder: Path) -> dict[str, str]:
    """What lies in the folder: links by where they lead, files by their hash, folders as such."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = (
            "folder"
            if path.is_dir()
            else hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else "special"
        )
        found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}" if path.is_symlink() else kind
    return found


def in_namespace(kinds: list[str], command: list[str], script: str, cwd: Path, *arguments: object) -> str:
    """Run Python in namespaces of its own after the shell `command`s; its stdout. Skips where that takes rights we lack."""
    unshare = ["unshare", "--user", "--map-root-user", *kinds, "sh", "-c", " && ".join([*command, 'exec "$@"']), "sh"]
    try:
        subprocess.run([*unshare, "true"], cwd=cwd, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs namespaces of its own (unshare)")
    helpers = str(Path(__file__).parent)
    program = [sys.executable, "-P", "-c", textwrap.dedent(script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": helpers}
    done = subprocess.run([*unshare, *program], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
