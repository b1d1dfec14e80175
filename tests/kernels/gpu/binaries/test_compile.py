"""Kernels compiled without a GPU: what is reported of them, what is refused, which assembler is taken."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import interpreter_kernels
import packed_kernels
from packed_kernels import FUNCTIONS, dot, nested, plain
from places import HELPERS, ROOT

from mla2dsa.errors import UserError
from mla2dsa.kernels.gpu.binaries import ptxas
from mla2dsa.kernels.gpu.binaries.compile import (
    ARCHITECTURES,
    SHARED_LIMIT,
    _check_limits,
    _target,
    _to_ptx,
    compile_variant,
)
from mla2dsa.kernels.gpu.binaries.ptxas import Assembled, Ptxas, assemble, assemble_best, installed
from mla2dsa.kernels.gpu.binaries.source import source_hash
from mla2dsa.kernels.gpu.programs.program import Variant


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_a_compiled_kernel_and_what_is_known_of_it(sm: int) -> None:
    made = compile_variant(nested(), sm, FUNCTIONS)
    assert made.cubin[:4] == b"\x7fELF"
    assert made.sm == sm
    assert made.target == (f"sm_{sm}a" if sm >= 90 else f"sm_{sm}")
    assert b".text." + made.entry.encode() in made.cubin
    assert made.threads == 128
    assert made.parameters == (
        ("x", "*fp32"),
        ("out", "*fp32"),
        ("n", "i32"),
        ("global_scratch", "*i8"),
        ("profile_scratch", "*i8"),
    )
    assert 0 < made.registers <= 255
    assert made.spilled == made.tmem == 0
    assert made.ptxas in [tool.name for tool in installed()]


def test_warps_shared_memory_and_tensor_memory() -> None:
    made = compile_variant(dot(warps=8), 100, FUNCTIONS)
    assert made.threads == 256
    assert made.shared >= 2 * 64 * 64 * 2  # both operands
    assert made.tmem == 64  # columns: the float32 sums


def test_alignment_makes_wide_loads() -> None:
    aligned, unknown = nested(1024), Variant(**{**vars(nested(1024)), "aligned": frozenset()})
    wide, narrow = (_to_ptx(FUNCTIONS["nested"], variant, 90)[0] for variant in (aligned, unknown))
    assert "ld.global.v4" in wide
    assert "ld.global.v4" not in narrow


def strings(content: bytes) -> str:
    return "\n".join(found.decode() for found in re.findall(rb"[\x20-\x7e]{4,}", content))


@pytest.mark.parametrize("sm", [80, 100])
def test_a_cubin_names_no_path_of_this_machine(sm: int, tmp_path: Path) -> None:
    text = strings(compile_variant(nested(), sm, FUNCTIONS).cubin)
    here = [sys.prefix, str(Path.home()), str(ROOT), str(tmp_path.parent), "interpreter_kernels"]
    assert not [part for part in [*here, "/tmp", "mla2dsa", ".py"] if part in text]


COMPILE_ELSEWHERE = """
import hashlib, sys
sys.path[:] = [{tests!r}, *sys.path]
from packed_kernels import FUNCTIONS, dot
from mla2dsa.kernels.gpu.binaries.compile import compile_variant
print(hashlib.sha256(compile_variant(dot(), 100, FUNCTIONS).cubin).hexdigest())
"""


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    """On sm_100, where ptxas left to itself gives one of two results."""
    import hashlib

    first = compile_variant(dot(), 100, FUNCTIONS)
    assert all(compile_variant(dot(), 100, FUNCTIONS) == first for _ in range(4))
    code = COMPILE_ELSEWHERE.format(tests=str(HELPERS))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(first.cubin).hexdigest()


@pytest.mark.parametrize(
    ("variant", "sm", "message"),
    [
        (nested(), 75, "sm_75 is not supported, expected one of 80, 86, 89, 90, 100, 120"),
        (plain("mystery"), 90, "kernel mystery is not known, expected one of dot, ill_typed"),
        (plain("uses_constant", ("x", "*fp32")), 90, r"kernel uses_constant takes \(out\), the variant gives \(x\)"),
        (plain("uses_constant", ("out", "*fp32"), BLOCK=1), 90, r"constants \(BLOCK\)"),
        (Variant("uses_constant", (), (("out", "*fp32"),), frozenset({"in"}), 4, 1), 90, "in cannot be aligned"),
        (dot(128, 128, 256), 89, r"dot\(M=128.* on sm_89: needs 131072 bytes of shared memory, the limit is 101376"),
        (
            dot(128, 1024, 16, 8),
            100,
            "on sm_100: (needs 1024 columns of tensor memory, the limit is 512|Triton does not)",
        ),
        (
            plain("needs_scratch", ("x", "*fp32"), ("out", "*fp32"), ("n", "i32"), BLOCK=64),
            90,
            "on sm_90: needs 128 bytes of global_scratch, the limit is 0",
        ),
        (plain("ill_typed", ("x", "*fp32")), 90, "on sm_90: Triton does not compile it: CompilationError: "),
    ],
    ids=["sm", "kernel", "argument", "constant", "alignment", "shared", "tmem", "scratch", "triton"],
)
def test_what_cannot_run_is_refused_in_one_line(variant: Variant, sm: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        compile_variant(variant, sm, FUNCTIONS)
    assert "\n" not in str(caught.value)


def test_a_kernel_that_became_a_trap_is_refused() -> None:
    ptx, metadata = _to_ptx(FUNCTIONS["nested"], nested(), 90)
    _check_limits(nested(), 90, ptx, metadata)
    with pytest.raises(UserError, match="trap"):
        _check_limits(nested(), 90, ptx.replace("ret;", "trap;\n\tret;"), metadata)


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_shared_memory_may_be_used_to_the_last_byte(sm: int) -> None:
    _check_limits(nested(), sm, "", {"shared": SHARED_LIMIT[sm]})
    with pytest.raises(UserError, match=f"needs {SHARED_LIMIT[sm] + 1} bytes"):
        _check_limits(nested(), sm, "", {"shared": SHARED_LIMIT[sm] + 1})


TOOLS = tuple(Ptxas((12, minor, 0), Path(f"ptxas-{minor}")) for minor in range(4))


@pytest.mark.parametrize(
    ("spills", "chosen", "asked"),
    [
        ([0, 0, 0, 0], "12.0.0", 1),
        ([8, 0, 4, 0], "12.1.0", 2),
        ([8, 4, 4, 12], "12.1.0", 4),
        ([None, 4, None, 2], "12.3.0", 4),
    ],
    ids=str,
)
def test_the_assembler_that_spills_least_is_taken(
    spills: list[int | None], chosen: str, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def pretend(ptx: str, architecture: str, tool: Ptxas) -> Assembled:
        calls.append(tool)
        spilled = spills[tool.version[1]]
        if spilled is None:
            raise UserError("not for me")
        return Assembled(b"", 32, spilled, tool.name)

    monkeypatch.setattr(ptxas, "assemble", pretend)
    assert assemble_best("", "sm_90a", TOOLS).ptxas == chosen
    assert len(calls) == asked


def test_ptx_that_no_assembler_takes_is_refused() -> None:
    with pytest.raises(UserError, match=r"ptxas \d+\.\d+\.\d+ for sm_90a: .*fatal.*; ptxas") as caught:
        assemble_best("nonsense", "sm_90a", installed()[:1] * 2)
    assert "\n" not in str(caught.value)


def test_spilled_bytes_are_counted() -> None:
    """128 x 256 float32 sums are more than the registers of 128 threads hold."""
    ptx, _ = _to_ptx(FUNCTIONS["dot"], dot(128, 256, 64), 80)
    made = assemble(ptx, _target(ptx), installed()[0])
    assert made.spilled > 0
    assert made.registers == 255


def test_assemblers_are_found_by_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, broken = tmp_path / "mine", tmp_path / "broken"
    mine.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 99.1, V99.1.7'\n")
    broken.write_text("#!/bin/sh\nexit 1\n")
    for script in (mine, broken):
        script.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(mine))
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", str(broken))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    found = installed.__wrapped__()
    assert [tool.version for tool in found] == sorted({tool.version for tool in found})
    assert found[-1] == Ptxas((99, 1, 7), mine)
    assert any("triton" in str(tool.path) for tool in found)
    monkeypatch.setattr(ptxas, "_candidates", lambda: [broken, tmp_path / "nowhere"])
    with pytest.raises(UserError, match="no ptxas works on this machine"):
        installed.__wrapped__()


def test_the_source_hash_follows_helpers_and_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    before = source_hash(FUNCTIONS["nested"])
    assert source_hash(FUNCTIONS["dot"]) != before
    assert source_hash(FUNCTIONS["nested"]) == before
    with monkeypatch.context() as patch:  # through outer_helper, helper
        patch.setattr(interpreter_kernels, "OFFSET", tl.constexpr(2.0))
        assert source_hash(FUNCTIONS["nested"]) != before
    with monkeypatch.context() as patch:
        patch.setattr(interpreter_kernels, "helper", FUNCTIONS["dot"])
        assert source_hash(FUNCTIONS["nested"]) != before
    with monkeypatch.context() as patch:  # through a module
        patch.setattr(interpreter_kernels.interpreter_helpers, "plus_ten", FUNCTIONS["dot"])
        assert source_hash(FUNCTIONS["nested"]) != before
    assert source_hash(FUNCTIONS["nested"]) == before
    assert packed_kernels.FUNCTIONS is FUNCTIONS
