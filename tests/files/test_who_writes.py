"""Only a few modules of `files` may open files for writing, link, rename or remove: everybody else goes through them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT, package_files

OPENING, LINKING, RENAMING, REMOVING, TEMPORARY, SAVING = (
    "opens a file for writing", "makes a link", "renames", "removes", "makes a temporary file", "has a library write to a path",
)  # fmt: skip
EVERYWHERE = "anywhere"
MAY = {
    Path("files/writing.py"): {OPENING, LINKING},
    Path("files/regular.py"): {OPENING},  # for reading alone, in a way that `open` cannot
    Path("files/locks.py"): {OPENING, REMOVING},  # lock files
    Path("files/system_calls.py"): {RENAMING},
    Path("files/temporary.py"): {RENAMING, REMOVING, TEMPORARY},  # a file that has no name
    Path("files/ownership.py"): {REMOVING},
    Path("files/staging.py"): {RENAMING, REMOVING},
    Path("cli.py"): {OPENING},  # the null device, in the place of a stdout that is gone
    Path("exporters/engine/plugin_sources.py"): {OPENING},  # in the folder where setuptools builds a wheel
    Path("exporters/report/plots.py"): {SAVING},  # into memory
}
OS = {
    **dict.fromkeys(["open", "fdopen", "truncate", "mkfifo", "mknod"], OPENING),
    **dict.fromkeys(["link", "symlink"], LINKING),
    **dict.fromkeys(["rename", "renames", "replace"], RENAMING),
    **dict.fromkeys(["unlink", "remove", "rmdir", "removedirs"], REMOVING),
}
SHUTIL = {
    **dict.fromkeys(["copy", "copy2", "copyfile", "copytree", "unpack_archive", "make_archive"], OPENING),
    "move": RENAMING,
    "rmtree": REMOVING,
}  # fmt: skip
METHODS = {
    **dict.fromkeys(["write_text", "write_bytes", "touch", "tofile", "memmap"], OPENING),
    **dict.fromkeys(["hardlink_to", "symlink_to"], LINKING),
    "rename": RENAMING,
    **dict.fromkeys(["unlink", "rmtree"], REMOVING),
    **dict.fromkeys(
        ["save_file", "save_model", "save_pretrained", "savez", "savez_compressed", "savefig", "to_csv"], SAVING
    ),
}
SAVERS = {"onnx", "ir", "onnx_ir", "torch", "np", "numpy", "export", "safetensors"}  # whose save() takes a path
READING = {"r", "rb", "rt"}


def writes(source: str) -> Iterator[tuple[int, str]]:
    """(line, what it does) of every call that could harm a file."""
    tree = ast.parse(source)
    made = _streams(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            kind = _kind(node, made)
            if kind is not None:
                yield node.lineno, kind
        elif isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil", "tempfile", "io") and node.level == 0:
            yield node.lineno, f"imports from {node.module}, which hides what is called"


def _streams(tree: ast.AST) -> set[str]:
    """Names of streams that `create` has opened."""
    items = [item for node in ast.walk(tree) if isinstance(node, ast.With) for item in node.items]
    return {
        item.optional_vars.id
        for item in items
        if isinstance(item.optional_vars, ast.Name)
        and isinstance(item.context_expr, ast.Call)
        and ast.unparse(item.context_expr.func) == "create"
    }


def _kind(call: ast.Call, made: set[str]) -> str | None:
    function = call.func
    if isinstance(function, ast.Name):
        return OPENING if function.id == "open" and not _reads(call, 1) else METHODS.get(function.id)
    if not isinstance(function, ast.Attribute):
        return None
    owner, name = ast.unparse(function.value), function.attr
    if (owner, name) == ("os", "open") and "os.O_RDONLY" in ast.unparse(call):
        return None
    if owner in ("os", "shutil"):
        return (OS if owner == "os" else SHUTIL).get(name)
    if owner == "tempfile" and name != "gettempdir":
        return TEMPORARY
    if name == "open":
        return _opened(call, owner)
    if name == "save" and owner.rpartition(".")[2] in SAVERS:
        return None if any(isinstance(it, ast.Name) and it.id in made for it in call.args) else SAVING
    if name == "replace" and len(call.args) == 1 and not call.keywords and owner != "dataclasses":
        return RENAMING  # Path.replace; str.replace takes two
    return METHODS.get(name)


def _opened(call: ast.Call, owner: str) -> str | None:
    """Path.open has the mode first; io.open, gzip.open and the like second."""
    if owner in ("io", "gzip", "bz2", "lzma", "codecs", "tarfile", "zipfile"):
        return None if _reads(call, 1) else OPENING
    if owner in ("Checkpoint", "Donor", "ProgressStore", "cls"):
        return None  # classmethods of ours
    return None if _reads(call, 0) else OPENING


def _reads(call: ast.Call, position: int) -> bool:
    modes = (
        [call.args[position]] if len(call.args) > position else [it.value for it in call.keywords if it.arg == "mode"]
    )
    return not modes or (isinstance(modes[0], ast.Constant) and modes[0].value in READING)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("open(p, 'w')", OPENING),
        ("open(p, mode='ab')", OPENING),
        ("open(p, mode)", OPENING),
        ("p.open('xb')", OPENING),
        ("p.open('r+b')", OPENING),
        ("os.open(p, os.O_RDWR)", OPENING),
        ("gzip.open(p, 'wb')", OPENING),
        ("(a / 'b').write_text(x)", OPENING),
        ("p.write_bytes(x)", OPENING),
        ("shutil.copyfile(a, b)", OPENING),
        ("shutil.move(a, b)", RENAMING),
        ("os.replace(a, b)", RENAMING),
        ("p.replace(q)", RENAMING),
        ("p.rename(q)", RENAMING),
        ("os.link(a, b)", LINKING),
        ("p.symlink_to(q)", LINKING),
        ("shutil.rmtree(p)", REMOVING),
        ("p.unlink(missing_ok=True)", REMOVING),
        ("tempfile.mkdtemp()", TEMPORARY),
        ("with tempfile.TemporaryDirectory() as p:\n    pass", TEMPORARY),
        ("onnx.save(model, path)", SAVING),
        ("torch.export.save(program, path)", SAVING),
        ("torch.save(x, 'f')", SAVING),
        ("safetensors.torch.save_file(t, f)", SAVING),
        ("save_file(t, f)", SAVING),
        ("model.save_pretrained(f)", SAVING),
        ("np.memmap(f, mode='w+')", OPENING),
        ("from shutil import rmtree", "imports from shutil, which hides what is called"),
    ],
)  # fmt: skip
def test_calls_that_write_are_seen(source: str, kind: str) -> None:
    assert list(writes(source)) == [(1, kind)]


@pytest.mark.parametrize(
    "source",
    [
        "open(p)", "open(p, 'rb')", "os.open(p, os.O_RDONLY)", "p.open('rb')", "p.open()", "p.read_text()", "text.replace('a', 'b')",
        "dataclasses.replace(x)", "replace(options, sms=sms)", "create(p)", "Checkpoint.open(model)", "safe_open(f, 'pt')",
        "with create(p) as stream:\n    torch.export.save(program, stream)", "save(tensors, about)", "p.mkdir()",
    ],
)  # fmt: skip
def test_calls_that_do_not(source: str) -> None:
    assert not list(writes(source))


@pytest.mark.parametrize("file", package_files(), ids=str)
def test_nobody_else_writes(file: Path) -> None:
    found = [(line, kind) for line, kind in writes((ROOT / file).read_text()) if kind not in MAY.get(file, ())]
    assert not found, (
        "; ".join(f"{file}:{line} {kind}" for line, kind in found) + ": go through files/writing.py or staging.py"
    )


def test_no_permission_is_left_over() -> None:
    for file, kinds in MAY.items():
        used = {kind for _, kind in writes((ROOT / file).read_text())}
        assert kinds <= used, f"{file} no longer {', '.join(kinds - used)}"


def test_new_files_are_opened_as_new() -> None:
    """The flags that the two openers pass: nothing that exists is opened for writing, and no link is followed."""
    import os

    from mla2dsa.files import locks, writing

    for flags in (writing._NEW, locks._NEW):
        assert flags & os.O_EXCL
        assert flags & os.O_NOFOLLOW
        assert not flags & os.O_TRUNC
    assert locks._THERE & os.O_NOFOLLOW
    assert not locks._THERE & os.O_TRUNC
