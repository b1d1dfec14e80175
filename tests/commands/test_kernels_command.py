"""`mla2dsa kernels build` and `list`, with a few kernels of the catalogue in place of all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import Done, assert_refused, mla2dsa

from mla2dsa.kernels.gpu.binaries.manifest import MANIFEST
from mla2dsa.kernels.gpu.binaries.pack import variants_of
from mla2dsa.kernels.gpu.programs import catalogue
from mla2dsa.kernels.gpu.programs.program import LaunchProgram

pytest.importorskip("triton")


def small_catalogue(sm: int) -> dict[str, LaunchProgram]:
    wanted = ("pack_latent", "sparse_mla.bf16.h8.r512.d64.decode")
    return {name: program for name, program in catalogue.catalogue(sm).items() if name.startswith(wanted)}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("mla2dsa.optimizer.kernel_packs.catalogue", small_catalogue)
    monkeypatch.setenv("MLA2DSA_CACHE", str(tmp_path_factory.getbasetemp() / "compiled"))


def build(out: Path, *arguments: object) -> Done:
    return mla2dsa("kernels", "build", "--out", out, "--jobs", 1, *arguments)


def test_build_writes_a_pack_and_says_what_is_in_it(tmp_path: Path) -> None:
    done = build(tmp_path / "pack", "--sm", "90,80")
    assert (done.code, done.err) == (0, "")
    kernels = {variant for sm in (80, 90) for variant in variants_of(small_catalogue(sm))}
    assert f"{tmp_path / 'pack'}: 5 binaries of {len(kernels)} kernels for sm_80, sm_90, 2 programs, " in done.out
    assert "spilled registers: " in done.out
    assert (tmp_path / "pack" / MANIFEST).is_file()
    assert_refused(build(tmp_path / "pack", "--sm", "90"), 2, "not empty", "--overwrite")
    found = build(tmp_path / "pack", "--sm", "sm_90", "--overwrite", "--json").json()
    assert (found["sms"], found["binaries"], found["programs"]) == ([90], 3, 2)
    assert found["bytes"] == sum(file.stat().st_size for file in (tmp_path / "pack").glob("*.cubin"))
    assert os.listdir(tmp_path) == ["pack"]


def test_build_makes_every_architecture_by_default(tmp_path: Path) -> None:
    assert build(tmp_path / "pack", "--json").json()["sms"] == [80, 89, 90, 100, 120]


def test_list_shows_what_a_pack_holds(tmp_path: Path) -> None:
    build(tmp_path / "pack", "--sm", "80,90")
    rows = mla2dsa("kernels", "list", tmp_path / "pack", "--json").json()["kernels"]
    assert [(row["kernel"], row["sm"]) for row in rows] == [
        ("combine", 80),
        ("combine", 90),
        ("pack_latent", 90),
        ("sparse_mla_split", 80),
        ("sparse_mla_split", 90),
    ]
    for row in rows:
        assert (tmp_path / "pack" / row["file"]).stat().st_size == row["bytes"]
        assert row["threads"] == 32 * row["num_warps"]
        assert row["registers"] > 0
    shown = mla2dsa("kernels", "list", tmp_path / "pack").out
    for part in ("kernel", "constants", "SM", "shared", "registers", "spilled", "bytes", "HEADS=8"):
        assert part in shown


def test_list_shows_what_would_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row["kernel"]: row for row in mla2dsa("kernels", "list", "--json").json()["kernels"]}
    assert rows["pack_latent"]["sms"] == [89, 90, 100, 120]
    assert rows["combine"]["sms"] == [80, 89, 90, 100, 120]
    assert "num_warps" in rows["combine"]
    shown = mla2dsa("kernels", "list").out
    assert "89, 90, 100, 120" in shown
    monkeypatch.setattr("mla2dsa.optimizer.kernel_packs.catalogue", catalogue.catalogue)
    assert len(mla2dsa("kernels", "list", "--json").json()["kernels"]) > 100


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("build", "--out", "x", "--sm", "ninety"), 2, ["--sm ninety", "80,90"]),
        (("build", "--out", "x", "--sm", "90,"), 2, ["--sm 90,"]),
        (("build", "--out", "x", "--sm", "75"), 2, ["sm_75 is not supported", "80, 86, 89, 90, 100, 120"]),
        (("build", "--out", "x", "--jobs", "0"), 2, ["--jobs 0"]),
        (("build",), 2, ["--out", "mla2dsa kernels build --help"]),
        ((), 2, ["COMMAND", "mla2dsa kernels --help"]),
        (("list", "nowhere"), 1, ["nowhere", "no manifest.json", "mla2dsa kernels build"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_calls_are_refused(
    arguments: tuple[str, ...], code: int, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(mla2dsa("kernels", *arguments), code, *parts)
    assert not list(tmp_path.iterdir())
