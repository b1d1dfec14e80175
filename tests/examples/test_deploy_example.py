"""examples/deploy/check_folder: a C++ process, with a driver that runs nothing, uses an engine folder's plugins."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from deploy_tools import Tools, check, compiled_tools

from mla2dsa.kernels.gpu.binaries.bundle import bundled, write_bundle
from mla2dsa.kernels.gpu.binaries.compile import Compiled
from mla2dsa.kernels.gpu.binaries.manifest import kernel_name
from mla2dsa.kernels.gpu.binaries.pack import compile_all
from mla2dsa.kernels.gpu.programs.op_program import OpProgram, op_program
from mla2dsa.kernels.gpu.programs.plugin_text import write_op
from mla2dsa.kernels.gpu.programs.program import Variant
from mla2dsa.kernels.op_spec import CACHE_WRITE, LIGHTNING_INDEXER, SPARSE_MLA

pytest.importorskip("triton")
LIBRARY = "libmla2dsa_trt.so"
SM = 90
OPEN = (None, None)
OPS = {
    "cache-latent": op_program(CACHE_WRITE, ("bf16", "bf16", "i64"), ((*OPEN, 48), (*OPEN, 48), OPEN), {}, (SM,)),
    "indexer": op_program(
        LIGHTNING_INDEXER, ("bf16", "bf16", "fp32", "i64", "i64"), ((*OPEN, 4, 32), (*OPEN, 32), (*OPEN, 4), OPEN, OPEN),
        {"topk": 16}, (SM,),
    ),
    "sparse": op_program(
        SPARSE_MLA, ("bf16", "bf16", "i32"), ((*OPEN, 4, 48), (*OPEN, 48), (*OPEN, None)),
        {"scale": 0.1, "kv_lora_rank": 32}, (SM,),
    ),
}  # fmt: skip


# Of the decode and the prefill forms.
EXPECTED = (
    "cache_write", "indexer_decode", "topk_histogram", "topk_compact", "topk_finish", "indexer_prefill", "topk_row",
    "sparse_mla_split", "combine", "sparse_mla",
)  # fmt: skip


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    return compiled_tools(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def fields() -> dict[str, tuple[str, bytes]]:
    """The two fields of each plugin, with real binaries."""
    made: dict[Variant, dict[int, Compiled]] = {}
    tasks = list(dict.fromkeys(task for op in OPS.values() for task in op.binaries()))
    for (variant, sm), compiled in compile_all(tasks, 2, None, lambda done, total: None):
        made.setdefault(variant, {})[sm] = compiled
    return {name: (write_op(op, kernel_name), _kernels(op, made)) for name, op in OPS.items()}


def _kernels(op: OpProgram, made: dict[Variant, dict[int, Compiled]]) -> bytes:
    return write_bundle({kernel_name(it): bundled(it, made[it]) for it, _ in op.binaries()})


@pytest.fixture
def folder(tools: Tools, fields: dict[str, tuple[str, bytes]], tmp_path: Path) -> Path:
    made = tmp_path / "engine folder"
    (made / "plugins").mkdir(parents=True)
    shutil.copy(tools.plugin, made / LIBRARY)
    for name, (program, kernels) in fields.items():
        (made / "plugins" / f"{name}.program").write_text(program)
        (made / "plugins" / f"{name}.kernels").write_bytes(kernels)
    return made


def test_a_folder_is_usable(tools: Tools, folder: Path, tmp_path: Path) -> None:
    launches = tmp_path / "launches"
    done = check(tools, folder, MOCK_LAUNCHES=str(launches))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "libmla2dsa_trt.so: LightningIndexer, SparseMLA, CacheWrite",
        "cache-latent: CacheWrite, decode ok, prefill ok",
        "indexer: LightningIndexer, decode ok, prefill ok",
        "sparse: SparseMLA, decode ok, prefill ok",
        f"3 plugins ok on sm_{SM}",
    ]
    launched = set(launches.read_text().split())
    assert len(launched) == len(EXPECTED)
    assert all(any(entry.startswith(name) for entry in launched) for name in EXPECTED), launched


def test_no_python_is_linked(tools: Tools, folder: Path) -> None:
    for file in (tools.checker, folder / LIBRARY):
        assert b"libpython" not in file.read_bytes()


def _without_library(folder: Path) -> None:
    (folder / LIBRARY).unlink()


def _not_a_library(folder: Path) -> None:
    (folder / LIBRARY).write_text("no library")


def _damaged(folder: Path) -> None:
    file = folder / "plugins" / "sparse.program"
    file.write_text(file.read_text().replace("workspace ", "workspaces ", 1))


def _unknown_op(folder: Path) -> None:
    file = folder / "plugins" / "indexer.program"
    file.write_text(file.read_text().replace("op LightningIndexer", "op Other"))


def _empty_program(folder: Path) -> None:
    (folder / "plugins" / "sparse.program").write_text("")


def _cut_kernels(folder: Path) -> None:
    file = folder / "plugins" / "cache-latent.kernels"
    file.write_bytes(file.read_bytes()[:-100])


def _without_kernels(folder: Path) -> None:
    (folder / "plugins" / "cache-latent.kernels").unlink()


def _without_plugins(folder: Path) -> None:
    shutil.rmtree(folder / "plugins")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_library, r"libmla2dsa_trt\.so: there is no plugin library"),
        (_not_a_library, r"the plugin library: .*libmla2dsa_trt\.so"),
        (_damaged, r"sparse\.program: sparse: program line \d+: workspaces is not known"),
        (_unknown_op, r"indexer\.program: the plugin library has no plugin Other"),
        (_empty_program, r"sparse\.program: its second line is not op NAME"),
        (_cut_kernels, r"cache-latent\.program: cache-latent: .*bytes"),
        (_without_kernels, r"cache-latent\.program: cannot be read"),
        (_without_plugins, r"plugins: there is no such folder"),
    ],
)
def test_what_is_wrong_is_said(tools: Tools, folder: Path, change: Callable[[Path], None], message: str) -> None:
    change(folder)
    refused(check(tools, folder), message)


def test_kernels_for_another_gpu_are_refused(tools: Tools, folder: Path) -> None:
    message = r"cache-latent\.program: cache-latent: built for sm_90; this GPU is sm_80; build again with --sm 80"
    refused(check(tools, folder, MOCK_SM="80"), message)


def test_no_driver(tools: Tools, folder: Path, tmp_path: Path) -> None:
    refused(check(tools, folder, MLA2DSA_LIBCUDA=str(tmp_path / "libcuda.so.1")), r"no CUDA driver: .*libcuda\.so\.1")


def test_usage(tools: Tools) -> None:
    refused(check(tools), r"usage: check_folder ENGINE_FOLDER")


def refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    """Exit code 1 and one line of check_folder's; the plugin library writes its own line before."""
    assert done.returncode == 1
    own = [line for line in done.stderr.splitlines() if not line.startswith("mla2dsa plugin: ")]
    assert len(own) == 1
    assert re.match(rf"check_folder: .*{message}", own[0]), own[0]
