"""Packs: what is written is whole and the same each time, damage is found, work is not done twice. And the catalogue."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from packed_kernels import FUNCTIONS, dot, nested, two_programs

from mla2dsa.errors import UsageError, UserError
from mla2dsa.files.user_cache import cache_folder
from mla2dsa.kernels.gpu.binaries import cache
from mla2dsa.kernels.gpu.binaries.compile import Compiled, compile_variant, describe
from mla2dsa.kernels.gpu.binaries.manifest import MANIFEST, Pack, kernel_name, read_pack, variant_fields
from mla2dsa.kernels.gpu.binaries.pack import pack, variants_of
from mla2dsa.kernels.gpu.programs.catalogue import FAMILIES, catalogue
from mla2dsa.kernels.gpu.programs.program import LaunchProgram, Variant

MAX_SPILLED = 16  # bytes, where kernels have been tuned


@pytest.fixture(autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this session's own, shared by its workers: what the user has compiled is not believed here."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    monkeypatch.setenv("MLA2DSA_CACHE", str(folder / "compiled"))
    return folder / "compiled"


def make(out: Path, sms: tuple[int, ...] = (80, 90), **options: Any) -> Pack:
    return pack(two_programs, sms, out, functions=FUNCTIONS, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_pack_holds_every_kernel_for_every_architecture(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    made = make(tmp_path / "pack", on_progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert made.sms == (80, 90)
    shared, old, new = kernel_name(nested()), kernel_name(dot()), kernel_name(dot(warps=8))
    assert {name: sorted(kernel.binaries) for name, kernel in made.kernels.items()} == {
        shared: [80, 90],
        old: [80],
        new: [90],
    }
    for name, kernel in made.kernels.items():
        for sm, binary in kernel.binaries.items():
            assert made.cubin(name, sm) == compile_variant(kernel.variant, sm, FUNCTIONS).cubin
            assert binary.bytes == len(made.cubin(name, sm))
    assert len(files(tmp_path / "pack")) == 5
    assert os.listdir(tmp_path) == ["pack"]


def test_programs_are_read_back(tmp_path: Path) -> None:
    made = make(tmp_path / "pack")
    for sm in made.sms:
        assert {name: by_sm[sm] for name, by_sm in made.programs.items()} == two_programs(sm)


def test_the_manifest_reads_like_this(tmp_path: Path) -> None:
    make(tmp_path / "pack")
    manifest = json.loads((tmp_path / "pack" / MANIFEST).read_text())
    assert list(manifest) == ["format", "versions", "sms", "kernels", "programs", "files"]
    assert sorted(manifest["versions"]) == ["mla2dsa", "triton"]
    kernel = manifest["kernels"][kernel_name(nested())]
    assert {key: value for key, value in kernel.items() if key not in ("source", "binaries")} == {
        "kernel": "nested",
        "constants": {"BLOCK": 256},
        "arguments": [["x", "*fp32"], ["out", "*fp32"], ["n", "i32"]],
        "aligned": ["x"],
        "num_warps": 4,
        "num_stages": 2,
        "hidden": ["global_scratch", "profile_scratch"],
    }
    assert set(kernel["binaries"]["90"]) == {
        *("file", "sha256", "bytes", "entry", "target", "threads", "shared", "registers", "spilled", "tmem", "ptxas")
    }
    assert [entry["sms"] for entry in manifest["programs"]["rows"]] == [[80, 90]]
    assert [entry["sms"] for entry in manifest["programs"]["product"]] == [[80], [90]]
    assert manifest["programs"]["rows"][0]["program"][-2:] == [
        f"launch {kernel_name(nested())} d0.0 1 1 wvt,4,* t1@d0.0,8,* id0.0,vt,- n n",
        "end",
    ]


def test_the_same_input_gives_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "one")
    monkeypatch.setenv("MLA2DSA_CACHE", str(tmp_path / "empty"))
    make(tmp_path / "two", sms=(90, 80, 90))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_names_follow_what_is_compiled() -> None:
    assert kernel_name(nested()) == kernel_name(nested()) != kernel_name(nested(512))
    unaligned = Variant(**{**vars(nested()), "aligned": frozenset()})
    assert kernel_name(unaligned) != kernel_name(nested())
    assert json.loads(json.dumps(variant_fields(nested()))) == variant_fields(nested())


def forbid(*_: object) -> Compiled:
    raise AssertionError("compiled again")


def test_nothing_is_compiled_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "one")
    monkeypatch.setattr(cache, "compile_variant", forbid)
    make(tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1] + b"x",
        lambda content: content[:20],
        lambda content: b"",
        lambda content: b"{}\n",
        lambda content: b"[1]\n",
        lambda content: content.replace(b'"entry"', b'"exit"'),
    ],
    ids=["changed", "cut", "empty", "no fields", "list", "other fields"],
)
def test_a_damaged_cache_entry_is_compiled_again(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLA2DSA_CACHE", str(tmp_path))
    made = cache.compile_cached(nested(), 90, FUNCTIONS)
    (entry,) = (tmp_path / "kernels").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert cache.compile_cached(nested(), 90, FUNCTIONS) == made
    assert entry.read_bytes() == whole
    monkeypatch.setattr(cache, "compile_variant", forbid)
    assert cache.compile_cached(nested(), 90, FUNCTIONS) == made


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MLA2DSA_CACHE", str(tmp_path / "file"))
    assert cache.compile_cached(nested(), 90, FUNCTIONS).entry == "nested"


def test_the_cache_key_follows_all_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [
        cache.cache_key(nested(), 90, FUNCTIONS),
        cache.cache_key(nested(), 80, FUNCTIONS),
        cache.cache_key(nested(512), 90, FUNCTIONS),
    ]
    for module_attribute in ("triton.__version__", "mla2dsa.kernels.gpu.binaries.cache.PTX_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(module_attribute, "0")
            keys.append(cache.cache_key(nested(), 90, FUNCTIONS))
    monkeypatch.setattr(cache, "installed", list)
    keys.append(cache.cache_key(nested(), 90, FUNCTIONS))
    assert len(set(keys)) == len(keys)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == Path(os.environ["MLA2DSA_CACHE"])
    monkeypatch.delenv("MLA2DSA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert cache_folder() == Path("/some/where/mla2dsa")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "mla2dsa"


def test_only_a_pack_is_overwritten_and_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    make(out)  # an empty folder is free
    with pytest.raises(UsageError, match="not empty; choose another output folder, or pass --overwrite"):
        make(out)
    make(out, sms=(90,), overwrite=True)
    assert len(files(out)) == 3
    (out / "note").write_text("")
    with pytest.raises(UsageError, match=r"holds note, which mla2dsa did not write"):
        make(out, sms=(90,), overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds no manifest of mla2dsa"):
        make(other, overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        make(other / "thesis.txt", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_a_failed_build_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    make(out)
    before = files(out)
    with pytest.raises(UserError, match="kernel nested is not known"):
        pack(two_programs, (80,), out, functions={"dot": FUNCTIONS["dot"]}, overwrite=True)
    with pytest.raises(UserError, match="sm_70 is not supported"):
        make(out, sms=(80, 70), overwrite=True)
    with pytest.raises(UsageError, match="no architecture"):
        make(out, sms=(), overwrite=True)
    monkeypatch.setattr(
        "mla2dsa.kernels.gpu.binaries.pack.write_manifest", lambda pack: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(UserError, match="out: not written, no space left on the disk"):
        make(out, overwrite=True)
    assert files(out) == before
    assert os.listdir(tmp_path) == ["out"]


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        change(content)
        (folder / MANIFEST).write_text(json.dumps(content))

    return apply


def first(content: dict[str, Any]) -> dict[str, Any]:
    binaries: dict[str, Any] = content["kernels"][kernel_name(dot())]["binaries"]
    return binaries


def a_cubin(folder: Path) -> Path:
    return folder / f"{kernel_name(dot())}.sm80.cubin"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "no manifest.json there, so it is no kernel pack"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json: not valid JSON"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "manifest.json: expected a JSON object, found list"),
        (edit(lambda content: content.update(format=2)), "manifest.json: format 2, this mla2dsa reads 1"),
        (edit(lambda content: content.pop("programs")), "manifest.json: damaged, programs: Field required"),
        (edit(lambda content: first(content)["80"].pop("entry")), r"binaries\.80\.entry: Field required"),
        (edit(lambda content: first(content)["80"].update(shared=-1)), r"binaries\.80\.shared: .* \(found -1\)"),
        (edit(lambda content: first(content)["80"].update(file=5)), r"binaries\.80\.file: .* valid string \(found 5\)"),
        (edit(lambda content: content.update(kernels=[])), "manifest.json: damaged, kernels: .* dictionary"),
        (lambda folder: a_cubin(folder).unlink(), "dot-[0-9a-f]+.sm80.cubin is missing"),
        (lambda folder: a_cubin(folder).write_bytes(b""), "dot-[0-9a-f]+.sm80.cubin is not what manifest.json says"),
        (
            edit(lambda content: first(content)["80"].update(file="../x")),
            "expected the name of a file in the same folder .found ../x",
        ),
        (edit(lambda content: first(content).pop("80")), "program product needs dot-[0-9a-f]+ for sm_80"),
        (
            edit(lambda content: content["programs"]["rows"][0]["program"].append("jump")),
            r"program rows: line \d+: 'jump' is not known",
        ),
        (
            edit(lambda content: content["kernels"].pop(kernel_name(dot()))),
            r"program product: line \d+: kernel dot-[0-9a-f]+ is not in the pack",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_is_found_when_a_pack_is_read(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path / "pack")
    damage(tmp_path / "pack")
    with pytest.raises(UserError, match=message) as caught:
        read_pack(tmp_path / "pack")
    assert str(caught.value).startswith(str(tmp_path / "pack"))
    assert "\n" not in str(caught.value)


def test_a_pack_may_be_moved(tmp_path: Path) -> None:
    make(tmp_path / "pack")
    shutil.move(tmp_path / "pack", tmp_path / "elsewhere")
    assert len(read_pack(tmp_path / "elsewhere").kernels) == 3


def some_of_the_catalogue(sm: int) -> dict[str, LaunchProgram]:
    return {name: program for name, program in catalogue(sm).items() if name.startswith("pack_latent")}


def test_processes_make_the_same_pack(tmp_path: Path) -> None:
    """Two fresh processes, which import what they compile from the registry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLA2DSA_CACHE", str(tmp_path / "cache"))
        pack(some_of_the_catalogue, (90, 100), tmp_path / "two", jobs=2)
    pack(some_of_the_catalogue, (90, 100), tmp_path / "one")
    assert files(tmp_path / "one") == files(tmp_path / "two")


# Every variant for one architecture; for the others one variant of each kernel, the one of the longest constants, for all of them
# would take two minutes more.
WHOLE = 90


@pytest.mark.parametrize("sm", FAMILIES)
def test_every_kernel_of_the_catalogue_compiles(sm: int) -> None:
    """The longest test there is: some fifty compilations. Limits are checked by the compiler itself."""
    variants = sorted(
        variants_of(catalogue(sm)), key=lambda variant: (variant.kernel, len(str(variant)), kernel_name(variant))
    )
    assert len(variants) > 30
    if sm != WHOLE:
        variants = list({variant.kernel: variant for variant in variants}.values())
    made = {variant: cache.compile_cached(variant, sm) for variant in variants}
    assert {variant.kernel for variant in made} == {variant.kernel for variant in variants_of(catalogue(sm))}
    spilling = {describe(variant): it.spilled for variant, it in made.items() if it.spilled > MAX_SPILLED}
    if sm in (80, 90):
        assert not spilling


@pytest.mark.parametrize("sm", FAMILIES)
def test_every_program_of_the_catalogue_survives_as_text(sm: int) -> None:
    from mla2dsa.kernels.gpu.programs.program_text import read_program, write_program

    by_name = {kernel_name(variant): variant for variant in variants_of(catalogue(sm))}
    for program in catalogue(sm).values():
        lines = write_program(program, kernel_name)
        again = read_program(lines, by_name)
        assert write_program(again, kernel_name) == lines
        assert (again.inputs, again.outputs, again.workspace) == (program.inputs, program.outputs, program.workspace)
        assert sum(map(len, lines)) < 8000


def test_kernels_have_distinct_names() -> None:
    variants = {variant for sm in FAMILIES for variant in variants_of(catalogue(sm))}
    assert len({kernel_name(variant) for variant in variants}) == len(variants)
