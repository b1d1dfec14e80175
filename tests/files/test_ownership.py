"""What is somebody else's is never replaced, whatever it looks like and whenever it came."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from owned import MANIFEST, in_namespace, publish, tree

from mla2dsa.errors import UsageError, UserError
from mla2dsa.files import system_calls
from mla2dsa.files.ownership import refuse_names, remove_ours, why_not_ours
from mla2dsa.files.staging import InTheWay, check_target, claim


@pytest.fixture(params=["exchange", "two-steps"], autouse=True)
def renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With what Linux has for folders, and as on a system without."""
    if request.param == "two-steps":
        monkeypatch.setattr(system_calls, "_renameat2", lambda *_: False)
    return str(request.param)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Written by an earlier run."""
    publish(tmp_path / "out", "old")
    return tmp_path / "out"


def edited(change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    def apply(out: Path) -> None:
        content = json.loads((out / MANIFEST).read_text())
        change(content)
        (out / MANIFEST).write_text(json.dumps(content))

    return apply


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """`make` something in the place of the file."""

    def apply(out: Path) -> None:
        (out / name).unlink()
        make(out / name)

    return apply


def link_inner(out: Path) -> None:
    os.rename(out / "inner", out.parent / "elsewhere")
    (out / "inner").symlink_to(out.parent / "elsewhere")


def someone_elses(out: Path) -> None:
    shutil.rmtree(out)
    (out / ".git").mkdir(parents=True)
    (out / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (out / "config.json").write_text("{}")
    (out / "thesis.py").write_text("three years")


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a-project-with-config.json": (someone_elses, "holds no manifest of mla2dsa"),
    "a-file-added": (lambda out: (out / "notes.txt").write_text("mine"), "holds notes.txt, which mla2dsa did not write"),
    "a-file-added-within": (lambda out: (out / "inner" / "photo.png").touch(), "holds inner/photo.png"),
    "a-hidden-file": (lambda out: (out / ".env").touch(), "holds .env"),
    "a-repository": (lambda out: (out / ".git").mkdir(), "holds .git"),
    "an-empty-folder": (lambda out: (out / "inner" / "plans").mkdir(), "holds inner/plans"),
    "a-link-for-a-file": (replaced("config.json", lambda file: file.symlink_to("/etc/hostname")), "holds config.json"),
    "a-link-to-nowhere": (lambda out: (out / "x").symlink_to("nowhere"), "holds x"),
    "a-link-for-a-folder": (link_inner, "holds inner"),
    "a-pipe-for-a-file": (replaced("config.json", os.mkfifo), "holds config.json"),
    "a-folder-for-a-file": (replaced("config.json", Path.mkdir), "holds config.json"),
    "an-older-manifest": (edited(lambda content: content.pop("files")), "does not list the folder's files"),
    "a-damaged-manifest": (lambda out: (out / MANIFEST).write_text("{"), "does not list the folder's files"),
    "no-manifest": (lambda out: (out / MANIFEST).unlink(), "holds no manifest of mla2dsa"),
    "a-manifest-that-is-a-link": (
        replaced(MANIFEST, lambda file: file.symlink_to("inner/weights")), "holds no manifest of mla2dsa",
    ),
    "a-manifest-that-climbs": (
        edited(lambda content: content["files"].append({"name": "../precious", "size": 1})), "does not list", # type: ignore[attr-defined]
    ),
    "a-manifest-with-a-root": (
        edited(lambda content: content.update(files=[{"name": "/etc/passwd", "size": 1}])), "does not list",
    ),
    "a-manifest-of-numbers": (edited(lambda content: content.update(files=[1, 2])), "does not list"),
    "another-tools-manifest.json": (
        replaced(MANIFEST, lambda file: (file.parent / "manifest.json").write_text('{"files": [], "name": "an extension"}')),
        "holds no manifest of mla2dsa",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), FOREIGN.values(), ids=FOREIGN.keys())
def test_overwrite_refuses(change: Callable[[Path], object], reason: str, out: Path) -> None:
    (out.parent / "precious").write_text("x")
    change(out)
    before = tree(out.parent)
    for overwrite, message in ((True, reason), (False, "not empty")):
        with pytest.raises(UsageError) as error:
            publish(out, overwrite=overwrite, meanwhile=lambda: pytest.fail("work was begun"))
        assert str(error.value).startswith(f"{out}: ")
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert remove_ours(out) is not None
    assert tree(out.parent) == before


def test_overwrite_replaces_what_is_ours(out: Path) -> None:
    (out / "config.json").write_text("edited by hand, and still ours")
    assert why_not_ours(out) is None
    publish(out, overwrite=True)
    assert (out / "inner" / "weights").read_text() == "new"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def arrive(path: Path, kind: str) -> None:
    """Somebody puts something there."""
    match kind:
        case "folder":
            path.mkdir(exist_ok=True)
            (path / "thesis.txt").write_text("three years of work")
        case "file":
            path.write_text("mine")
        case "link":
            (path.parent / "mine").mkdir()
            (path.parent / "mine" / "thesis.txt").write_text("three years of work")
            path.symlink_to("mine")
        case "link-to-nowhere":
            path.symlink_to("nowhere")
        case "empty":
            path.mkdir()


def published_elsewhere(out: Path, error: UserError) -> None:
    (kept,) = out.parent.glob("out.mla2dsa-finished-*")
    assert str(error).startswith(f"{out}: ")
    assert str(kept) in str(error)
    assert (kept / "inner" / "weights").read_text() == "new"
    assert why_not_ours(kept) is None
    shutil.rmtree(kept)


@pytest.mark.parametrize("kind", ["folder", "file", "link", "link-to-nowhere", "empty"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_meanwhile_stays(kind: str, overwrite: bool, tmp_path: Path) -> None:
    out, expected = tmp_path / "out", tmp_path / "expected" / "out"
    expected.parent.mkdir()
    arrive(expected, kind)
    with pytest.raises(InTheWay) as error:
        publish(out, overwrite=overwrite, meanwhile=lambda: arrive(out, kind))
    published_elsewhere(out, error.value)
    assert tree(expected.parent) == {
        name: kind for name, kind in tree(tmp_path).items() if not name.startswith("expected")
    }


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_comes_in_the_place_of_an_empty_folder_stays(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def meanwhile() -> None:
        if kind != "folder":
            out.rmdir()
        arrive(out, kind)

    with pytest.raises(InTheWay) as error:
        publish(out, meanwhile=meanwhile)
    published_elsewhere(out, error.value)
    assert (out.read_text() if kind == "file" else (out / "thesis.txt").read_text()) in ("mine", "three years of work")


def move_away_and(kind: str, out: Path) -> None:
    os.rename(out, out.parent / "moved")
    arrive(out, kind)


REPLACED: dict[str, Callable[[Path], object]] = {
    "a-file-within": lambda out: (out / "inner" / "notes.txt").write_text("mine"),
    "another-folder": lambda out: move_away_and("folder", out),
    "a-link": lambda out: move_away_and("link", out),
    "a-file": lambda out: move_away_and("file", out),
    "the-like-of-ours": lambda out: (os.rename(out, out.parent / "moved"), shutil.copytree(out.parent / "moved", out)),
    "manifest-removed": lambda out: (out / MANIFEST).unlink(),
}


@pytest.mark.parametrize("change", REPLACED.values(), ids=REPLACED.keys())
def test_what_comes_to_a_folder_that_is_replaced_stays(change: Callable[[Path], object], out: Path) -> None:
    seen: dict[str, str] = {}

    def meanwhile() -> None:
        change(out)
        seen.update({name: kind for name, kind in tree(out.parent).items() if not name.startswith(".out.")})

    with pytest.raises(InTheWay) as error:
        publish(out, overwrite=True, meanwhile=meanwhile)
    published_elsewhere(out, error.value)
    assert tree(out.parent) == seen


def test_a_folder_that_is_gone_meanwhile_is_made_anew(out: Path) -> None:
    publish(out, overwrite=True, meanwhile=lambda: shutil.rmtree(out))
    assert (out / "config.json").read_text() == "new"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("step", ["exchanged", "changed-then-exchanged", "a-link-exchanged", "aside"])
def test_a_run_killed_while_replacing(step: str, out: Path) -> None:
    """The work folder then holds what was at OUT: it goes if it is ours, and is shown if it is not."""
    work = out.parent / ".out.mla2dsa-work-00112233"
    work.mkdir()
    (work / "lock").touch()
    (work / "number").write_text("1")  # of another folder than the one that lies there
    if step == "a-link-exchanged":
        (work / "in").symlink_to(shutil.copytree(out, out.parent / "mine"))
    else:
        shutil.copytree(out, work / ("old" if step == "aside" else "in"))
    if step.startswith("changed"):
        (work / "in" / "notes.txt").write_text("mine")
    if step in ("exchanged", "aside"):
        publish(out, overwrite=True)
    else:
        with pytest.raises(UserError, match=r"what was there before .* it is .*out\.mla2dsa-replaced-[0-9a-f]+ now"):
            publish(out, overwrite=True)
        (kept,) = out.parent.glob("out.mla2dsa-replaced-*")
        assert (kept / "config.json").read_text() == "old"
        assert kept.is_symlink() or (kept / "notes.txt").read_text() == "mine"
        publish(out, overwrite=True)
    assert (out / "config.json").read_text() == "new"
    assert not list(out.parent.glob(".*"))


# OUT and what is read

OVERLAPS = {
    "the-same": ("source", "source", "the same folder"),
    "by-link": ("link", "source", "the same folder"),
    "source-by-link": ("source", "link", "the same folder"),
    "by-dots": ("source/inner/..", "source", "the same folder"),
    "by-the-long-way": ("x/../link/inner/..", "source", "the same folder"),
    "inside": ("source/out", "source", "inside one another"),
    "inside-by-link": ("into/out", "source", "inside one another"),
    "inside-deep": ("source/a/b/c", "source", "inside one another"),
    "around": (".", "source", "inside one another"),
    "around-by-link": (".", "into", "inside one another"),
    "a-file-of-it": ("source/config.json", "source", "inside one another"),
}


@pytest.mark.parametrize(("out", "source", "message"), OVERLAPS.values(), ids=OVERLAPS.keys())
def test_source_and_output_that_overlap(out: str, source: str, message: str, tmp_path: Path) -> None:
    room = tmp_path / "room"
    publish(room / "source")
    (room / "link").symlink_to("source")
    (room / "into").symlink_to("source/inner")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=message):
        publish(room / out, "x", room / source, overwrite=True)
    assert tree(tmp_path) == before


def test_neighbours_with_like_names_do_not_overlap(tmp_path: Path) -> None:
    publish(tmp_path / "model")
    publish(tmp_path / "model-dsa", "x", tmp_path / "model")
    publish(tmp_path / "model.2" / "model", "x", tmp_path / "model")


BOUND = """
    import sys
    from pathlib import Path
    from owned import publish
    from mla2dsa.errors import UsageError
    for out in ("other", "other/inner", "source/../other"):
        try:
            publish(Path(out), "x", Path("source"), overwrite=True)
        except UsageError as error:
            print(str(error).split(": ")[1])
    (Path("other") / "inner" / "weights").read_text()
"""


def test_a_source_that_is_mounted_twice(tmp_path: Path) -> None:
    """A bind mount: another path, no link, the same folder."""
    publish(tmp_path / "source")
    (tmp_path / "other").mkdir()
    before = tree(tmp_path)
    said = in_namespace(["--mount"], ["mount --bind source other"], BOUND, tmp_path).splitlines()
    assert said[0].startswith("output and source are the same folder")
    assert "inside one another" in said[1]
    assert said[2].startswith("output and source are the same folder")
    assert tree(tmp_path) == before


MOUNTED = """
    from pathlib import Path
    from owned import publish
    from mla2dsa.errors import UserError
    for out in ("disk", "readonly/out"):
        try:
            publish(Path(out))
        except UserError as error:
            print(error)
"""


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "readonly").mkdir()
    mounts = ["mount -t tmpfs none disk", "mount -t tmpfs -o ro none readonly"]
    said = in_namespace(["--mount"], mounts, MOUNTED, tmp_path, "x").splitlines()
    assert said[0] == f"{tmp_path}/disk: is where a disk is mounted, which cannot be replaced; choose a folder in it"
    assert said[1].startswith(f"{tmp_path}/readonly/out: not written, Read-only file system")


def test_links_that_go_round(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError, match="a: "):
        publish(tmp_path / "a")


def test_output_that_is_a_link(out: Path) -> None:
    """The folder that it leads to is meant; the link stays."""
    (out.parent / "link").symlink_to(out)
    publish(out.parent / "link", overwrite=True)
    assert (out.parent / "link").is_symlink()
    assert (out / "config.json").read_text() == "new"


def test_hard_links_between_source_and_output(tmp_path: Path) -> None:
    """Replacing and removing an output takes names away, never bytes."""
    source, out = tmp_path / "source", tmp_path / "out"
    publish(source, "precious")
    publish(out, "old")
    (out / "config.json").unlink()
    os.link(source / "config.json", out / "config.json")
    before = tree(source)
    publish(out, "new", source, overwrite=True)
    assert tree(source) == before
    assert (source / "config.json").stat().st_nlink == 1


def test_parents_that_were_made_go_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        publish(tmp_path / "a" / "b" / "out", meanwhile=lambda: 1 // 0)
    assert not list(tmp_path.iterdir())


def test_check_target_touches_nothing(tmp_path: Path) -> None:
    check_target(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_claim_within_a_claim_keeps_what_was_there_at_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claim(out) as first:
        arrive(out, "folder")
        with claim(out) as second:
            assert second is first
            assert second.before is None


@pytest.mark.parametrize("name", ["report.json", "REPORT.json", "report.json/inner.txt"])
def test_names_that_we_need(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the output needs the name report\.json for a file of its own; rename it"):
        refuse_names(tmp_path, ["model.safetensors", name], {"report.json"})
    refuse_names(tmp_path, ["my-report.json", "x/report.json"], {"report.json"})
