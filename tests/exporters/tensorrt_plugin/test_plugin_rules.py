"""What the plugin library does with what it is given, right and wrong: every refusal is one line that says what and where."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from places import HELPERS
from plugin_harness import TYPES as NUMBERS
from plugin_harness import Copy, Harness, Launch, Refused, failing, mock
from plugin_texts import KERNELS, TYPES, cubin, kernels, shapes, text

from mla2dsa.exporters.engine.plugin_build import build_plugin
from mla2dsa.kernels.gpu.binaries.bundle import BundledBinary, BundledKernel, write_bundle

INPUTS = 3
POINTERS = [0x10000, 0x20000, 0x30000, 0x40000, 0x30000]
WORKSPACE = 0x900000


def made(
    program: bytes | None = None, bundle: bytes | None = None, sm: int = 90, units: int = 132, **changes: int
) -> Harness:
    mock().mock_set(sm, units)
    return Harness.mocked(
        "SparseMLA", text() if program is None else program, kernels() if bundle is None else bundle, **changes
    )


def ready(program: bytes | None = None, sm: int = 90, units: int = 132, sizes: Any = None) -> Harness:
    plugin = made(program, sm=sm, units=units).attach()
    plugin.shapes(TYPES, INPUTS, shapes() if sizes is None else sizes)
    return plugin


def launches(
    plugin: Harness, sizes: Any = None, pointers: Any = None, workspace: int = WORKSPACE
) -> list[Launch | Copy]:
    return plugin.enqueue(TYPES, INPUTS, shapes() if sizes is None else sizes, pointers or POINTERS, workspace)


def test_what_a_plugin_says_of_itself() -> None:
    plugin = made()
    assert plugin.describe() == "mla2dsa::SparseMLA version 1, 2 outputs"
    assert [plugin.alias(output) for output in (0, 1, 2, -1)] == [-1, 2, -1, -1]
    assert plugin.output_types(TYPES[:INPUTS], 2) == [NUMBERS["bf16"], NUMBERS["i32"]]


def test_shapes_of_the_outputs() -> None:
    assert made().outputs([(-1, -1, 8), (-1, -1, 8), (-1, -1, -1)]) == "[d0.0,d0.1,4][d0.0,d0.1,d2.2]"
    assert made().outputs([(2, 5, 8), (2, 9, 8), (2, 5, 3)]) == "[2,5,4][2,5,3]"
    capped = made(text(("out bf16 d0.0 d0.1 4", "out bf16 d0.0 d0.1 2048,d1.1,<"), ("t3 id0.1", "t0 id0.1")))
    assert capped.outputs([(-1, -1, 8), (-1, -1, 8), (-1, -1, -1)]) == "[d0.0,d0.1,(2048 min d1.1)][d0.0,d0.1,d2.2]"
    assert capped.outputs([(1, 1, 8), (1, 100, 8), (1, 1, 1)]) == "[1,1,100][1,1,1]"


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ([(-1, -1), (-1, -1, 8), (-1, -1, -1)], "input 0"),
        ([(-1, -1, 9), (-1, -1, 8), (-1, -1, -1)], "input 0"),
        ([(2, -1, 8), (3, -1, 8), (-1, -1, -1)], "input 1"),
        ([(-1, -1, 8), (-1, -1, 8)], "inputs"),
    ],
    ids=["rank", "size", "other-input", "count"],
)
def test_shapes_that_the_program_does_not_take(dims: Any, message: str) -> None:
    with pytest.raises(Refused, match=message):
        made().outputs(dims)


def test_types() -> None:
    plugin, numbers = made(), [NUMBERS[kind] for kind in TYPES]
    assert all(plugin.supports(position, 3, 2, numbers) for position in range(5))
    for position in range(5):
        wrong = [*numbers[:position], NUMBERS["fp32"], *numbers[position + 1 :]]
        assert not plugin.supports(position, 3, 2, wrong)


def test_bytes_are_int8_or_uint8() -> None:
    plugin = made(text(("in bf16 * * 8", "in u8 * * 8")))
    assert plugin.supports(0, 3, 2, [2, 7, 3, 7, 3])
    assert plugin.supports(0, 3, 2, [5, 7, 3, 7, 3])
    assert not plugin.supports(0, 3, 2, [0, 7, 3, 7, 3])


def test_the_workspace_is_what_any_form_reserves() -> None:
    assert made().workspace(TYPES, INPUTS, shapes(2, 5)) == 2 * 5 * 64
    assert made(text(("workspace 0", "workspace 123456"))).workspace(TYPES, INPUTS, shapes()) == 123456


def test_a_run() -> None:
    """Two launches of a loop after one before it; parameters of every kind; the second output in place."""
    got = launches(ready())
    first, *loop = got
    one = 0x3F800000
    assert first == Launch("f90", (10, 1, 1), (128, 1, 1), 60_000, 60_000, 0, (0x10000, WORKSPACE, 5, 9, one, 0, 0))
    assert [(it.grid, it.words[:4]) for it in loop if isinstance(it, Launch)] == [
        ((2, 2, 2), (0x20000, WORKSPACE + 160, 0x30000, 0)),
        ((2, 2, 2), (0x20000 + 32, WORKSPACE + 160, 0x30000, 2)),
        ((1, 2, 2), (0x20000 + 64, WORKSPACE + 160, 0x30000, 4)),
    ]
    assert all(
        isinstance(it, Launch) and (it.entry, it.block, it.shared, it.opted) == ("s90", (96, 1, 1), 16, 0)
        for it in loop
    )


def test_the_first_form_that_holds() -> None:
    assert len(launches(ready(units=10))) == 1  # 2 * 5 queries are not fewer than 10 multiprocessors
    assert len(launches(ready(units=11))) == 4
    with pytest.raises(Refused, match="no form of the program is for sm_80 and these shapes"):
        ready(sm=80, units=10)
    assert {it.entry for it in launches(ready(sm=80, units=11)) if isinstance(it, Launch)} == {"f80", "s80"}


def test_memory_of_its_own_for_an_output_in_place() -> None:
    first, *rest = launches(ready(), pointers=[*POINTERS[:4], 0x50000])
    assert first == Copy(0x50000, 0x30000, 2 * 5 * 3 * 4)
    assert len(rest) == 4


def test_nothing_to_do() -> None:
    sizes = shapes(queries=0)
    assert launches(ready(sizes=sizes), sizes, workspace=0) == []


def test_another_gpu_is_named() -> None:
    plugin = made(sm=100).attach()  # a builder attaches on any machine
    with pytest.raises(Refused, match=r"node: built for sm_80, sm_90; this GPU is sm_100; build again with --sm 100"):
        plugin.shapes(TYPES, INPUTS, shapes())
    with pytest.raises(Refused, match="enqueue before onShapeChange has loaded the kernels"):
        launches(plugin)


@pytest.mark.parametrize("at", range(5))
def test_shapes_at_run_time(at: int) -> None:
    plugin, sizes = ready(), shapes()
    sizes[at] = (*sizes[at][:-1], sizes[at][-1] + 1) if at != 2 else (2, 6, 3)
    with pytest.raises(Refused, match=r"(input|output) \d"):
        plugin.shapes(TYPES, INPUTS, sizes)
    kinds = [*TYPES]
    kinds[at] = "fp32"
    with pytest.raises(Refused, match=r"(input|output) \d"):
        plugin.shapes(kinds, INPUTS, shapes())


@pytest.mark.parametrize(
    ("pointers", "workspace", "message"),
    [
        ([0x10008, *POINTERS[1:]], WORKSPACE, "parameter 0 of first is 0x10008, and has to be divisible by 16"),
        (POINTERS, WORKSPACE + 8, "parameter 1 of first"),
        (POINTERS, 0, "TensorRT gives no workspace, 320 bytes are needed"),
    ],
    ids=["pointer", "workspace", "no-workspace"],
)
def test_memory_that_is_not_right(pointers: list[int], workspace: int, message: str) -> None:
    with pytest.raises(Refused, match=message):
        launches(ready(), pointers=pointers, workspace=workspace)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("id0.1 ld1.1", "i2147483648 ld1.1", "parameter 2 is 2147483648, and has 32 bits"),
        ("launch first x0 1 1", "launch first x0 65536 1", "a grid of 65536 programs in dim 1"),
        ("launch first x0 1 1", "launch first 2147483648 1 1", "a grid of 2147483648 programs in dim 0"),
        ("launch first x0 1 1", "launch first 0,1,- 1 1", "the grid is -1"),
        ("repeat t d0.1 2", "repeat t d0.1 0", "a step of 0"),
        ("repeat t d0.1 2", "repeat t 1000000 1", "more than 65536 launches"),
        ("repeat t d0.1 2", "repeat t 9223372036854775807 1", "more than 65536 launches"),
        ("let x0 d0.0,d0.1,*", "let x0 9223372036854775807,d0.1,*", "does not fit 64 bits"),
        ("let x0 d0.0,d0.1,*", "let x0 1,d0.1,5,-,/", "divides by a number below 1"),
        ("workspace x0,32,*", "workspace x0,65,*", "a workspace of 650 bytes, and 640 are reserved"),
        ("workspace x0,32,*", "workspace 0,1,-", "the workspace is -1"),
        ("t0 w0", "t0 wx0,33,*", "points 330 bytes into 320"),
        ("t1@vt,16,*", "t1@0,1,-", "an offset is -1"),
    ],
)  # fmt: skip
def test_numbers_that_are_not_right(old: str, new: str, message: str) -> None:
    """Said when the shapes are known, before anything is launched."""
    with pytest.raises(Refused, match=rf"node: .*{message}"):
        ready(text((old, new)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mla2dsa-plugin 1", "mla2dsa-plugin 2", "line 1: the program has version 2, this plugin reads 1"),
        ("mla2dsa-plugin 1", "mla2dsa 1", "line 1: expected mla2dsa-plugin 1"),
        ("op SparseMLA", "op CacheWrite", "line 2: the program is of op CacheWrite, the plugin is SparseMLA"),
        ("in bf16 * * 8", "in bf17 * * 8", "line 3: type bf17 is not known"),
        ("in bf16 d0.0 * 8", "in bf16 d1.1 * 8", "line 4: d1.1: there is no such dim here"),
        ("in bf16 * * 8", "in bf16 1 2 3 4 5 6 7 8 9", "line 3: more than 8 dims"),
        ("alias 1 2", "alias 2 0", "line 8: there is no output 2"),
        ("alias 1 2", "alias 0 2", "line 8: an alias needs the same type"),
        ("alias 1 2", "jump", "line 8: jump is not known here"),
        ("form few 80,90", "form few 80,80", "line 9: architecture 80 twice"),
        ("form few 80,90", "form few x", "line 9: x is no architecture"),
        ("form few 80,90", "form few 80,100", "first has no binary for sm_100"),
        ("let x0 d0.0,d0.1,*", "let y d0.0", "line 10: expected let xN EXPRESSION"),
        ("let x0 d0.0,d0.1,*", "let x0  d0.0", "line 10: words are separated by single spaces"),
        ("let x0 d0.0,d0.1,*", "let x0 d0.0,d0.1", "line 10: expression d0.0,d0.1 leaves 2 values"),
        ("let x0 d0.0,d0.1,*", "let x0 d9.0", "line 10: d9.0: there is no such dim here"),
        ("let x0 d0.0,d0.1,*", "let x0 vt", "line 10: vt: there is no such variable here"),
        ("workspace x0,32,*\n", "", "the form has no workspace line"),
        ("launch first x0", "launch third x0", "there is no kernel third"),
        ("t0 w0 id0.1", "t0 id0.1", "first takes 7 parameters, the launch has 6"),
        ("t0 w0 id0.1", "t0 w0 ld0.1", "parameter 2 of first is i, the launch has l"),
        ("t0 w0", "t9 w0", "t9: there is no such tensor"),
        ("f3f800000", "f3F800000", "f3F800000 is not known in a launch"),
        ("let x1 d0.1,vt,-,2,<", "workspace 3", "workspace is not known inside of repeat"),
        ("n n\nend\nend\nform many", "n n\nend\nform many", "repeat twice|is not known"),
    ],
)  # fmt: skip
def test_programs_that_are_not_right(old: str, new: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        made(text((old, new)))


def test_limits_of_a_program() -> None:
    """As docs/tensorrt.md has them."""
    deep = ",".join(["1"] * 33 + ["+"] * 32)
    long = "1" + ",1,+" * 128
    many = "".join(f"let x{number} 1\n" for number in range(2, 4099))
    line = "launch first x0 1 1 t0 w0 id0.1 ld1.1 f3f800000 n n\n"
    for old, new, message in (
        ("let x0 d0.0,d0.1,*", f"let x0 {deep}", "more than 32 values on its stack"),
        ("let x0 d0.0,d0.1,*", f"let x0 {long}", "more than 256 parts"),
        ("let x0 d0.0,d0.1,*\n", f"let x0 d0.0,d0.1,*\n{many}", "more than 4096 names"),
        (line, line * 65, "more than 64 launches in a form"),
        (
            "form many",
            "".join(f"form f{n} 90 1\nworkspace 0\nend\n" for n in range(63)) + "form many",
            "more than 64 forms",
        ),
    ):
        with pytest.raises(Refused, match=message):
            made(text((old, new)))
    with pytest.raises(Refused, match="more than 1048576 bytes"):
        made(text() + b"x" * 2**20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "kernels: .* bytes, and the field says"),
        (lambda data: b"M2DX" + data[4:], "does not begin with M2DK"),
        (lambda data: data[:4] + b"\x02" + data[5:], "version 2, this plugin reads 1"),
        (lambda data: data.replace(b"ppilfnn", b"ppilxnn"), "each has to be one of p i l f n"),
        (lambda data: data.replace(b"\x7fELF", b"\x7fELX", 1), "is no cubin: it is no ELF file"),
        (lambda data: data.replace(b"\xbe\x00", b"\x3e\x00", 1), "is no cubin: it is for another machine"),
        (lambda data: data.replace(b"second", b"first\0"), "is not printable"),
    ],
    ids=["cut", "magic", "version", "parameters", "elf", "machine", "name"],
)
def test_kernels_that_are_not_right(change: Any, message: str) -> None:
    assert change(kernels()) != kernels()
    with pytest.raises(Refused, match=message):
        made(bundle=change(kernels()))


def test_a_cubin_whose_headers_point_outside() -> None:
    damaged = bytearray(cubin())
    damaged[40:48], damaged[58:62] = (10**6).to_bytes(8, "little"), bytes([64, 0, 3, 0])
    first = BundledKernel("ppilfnn", (), {sm: BundledBinary(64, 0, "f", bytes(damaged)) for sm in (80, 90)})
    with pytest.raises(Refused, match="first for sm_80 is no cubin: it is cut off"):
        made(bundle=write_bundle({**KERNELS, "first": first}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"program_size": -1}, "field program is missing"),
        ({"kernels_size": -1}, "field kernels is missing"),
        ({"program_size": 0}, "field program is empty"),
        ({"type": 5}, r"field \w+ has type 5, expected kCHAR"),
    ],
    ids=["program", "kernels", "empty", "type"],
)
def test_fields_that_are_missing(changes: dict[str, int], message: str) -> None:
    with pytest.raises(Refused, match=f"node: {message}"):
        made(**changes)


def test_the_fields_come_back_without_the_nul_of_the_parser() -> None:
    for end in (b"", b"\0"):
        plugin = made(text() + end, kernels() + end)
        for again in (plugin, plugin.clone(), plugin.attach()):
            assert again.field("program") == text()
            assert again.field("kernels") == kernels()
    with pytest.raises(Refused):
        made(bundle=kernels() + b"\0\0")


def test_a_plugin_outlives_what_it_was_cloned_from() -> None:
    plugin = made()
    copy = plugin.clone()
    plugin.free()
    attached = copy.attach()
    copy.free()
    attached.shapes(TYPES, INPUTS, shapes())
    assert len(launches(attached)) == 4
    attached.free()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("cuLaunchKernel", "launching first: CUDA_ERROR_OF_THE_MOCK"),
        ("cuMemcpyDtoDAsync_v2", "copying input 2 to output 1"),
    ],
)
def test_a_driver_that_fails_at_run_time(call: str, message: str) -> None:
    plugin = ready()
    with failing(call), pytest.raises(Refused, match=message):
        launches(plugin, pointers=[*POINTERS[:4], 0x50000])


LOADING = (
    "cuCtxGetCurrent", "cuCtxGetDevice", "cuDeviceGetAttribute", "cuModuleLoadData", "cuModuleGetFunction",
    "cuFuncSetAttribute", "cuFuncLoad",
)  # fmt: skip


@pytest.mark.parametrize("call", LOADING)
def test_a_driver_that_fails_when_kernels_are_loaded(call: str) -> None:
    """Attaching goes on, for a builder does it too; the shapes are refused, and taken once the driver works again."""
    fresh = {name: _other(kernel, call.encode() + name.encode()) for name, kernel in KERNELS.items()}
    with failing(call):
        plugin = made(bundle=write_bundle(fresh)).attach()
        with pytest.raises(Refused, match="CUDA_ERROR_OF_THE_MOCK"):
            plugin.shapes(TYPES, INPUTS, shapes())
    plugin.shapes(TYPES, INPUTS, shapes())
    assert len(launches(plugin)) == 4


def _other(kernel: BundledKernel, mark: bytes) -> BundledKernel:
    """With binaries that no other test has loaded."""
    binaries = {
        sm: BundledBinary(it.threads, 60_000, it.entry, cubin(mark + bytes([sm]))) for sm, it in kernel.binaries.items()
    }
    return BundledKernel(kernel.parameters, kernel.aligned, binaries)


def test_without_a_driver_plugins_are_made_and_the_reason_is_given() -> None:
    """In a process of its own: the driver is looked for once."""
    script = f"""
import ctypes, sys
sys.path.insert(0, {str(str(HELPERS))!r})
import plugin_harness
from plugin_texts import TYPES, kernels, shapes, text
plugin = plugin_harness.Harness.real("SparseMLA", text(), kernels())
print(plugin.outputs([(-1, -1, 8), (-1, -1, 8), (-1, -1, -1)]), plugin.workspace(TYPES, 3, shapes()))
try:
    plugin.attach().shapes(TYPES, 3, shapes())
except plugin_harness.Refused as error:
    print(error)
"""
    environment = {**os.environ, "MLA2DSA_LIBCUDA": "libcuda-that-is-not-there.so"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == [
        "[d0.0,d0.1,4][d0.0,d0.1,d2.2] 640",
        done.stdout.splitlines()[-1],
    ], done.stderr
    assert "node: no CUDA driver: libcuda-that-is-not-there.so" in done.stdout
    assert "mla2dsa plugin: node: no CUDA driver" in done.stderr


def test_the_library_asks_for_nothing_but_the_c_and_cpp_libraries() -> None:
    done = subprocess.run(["readelf", "-d", "--dyn-syms", "-W", build_plugin()], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("no readelf here")
    needed = {
        line.split("[")[1].split("]")[0].split(".so")[0] for line in done.stdout.splitlines() if "(NEEDED)" in line
    }
    assert needed <= {"libstdc++", "libgcc_s", "libc", "libm", "libdl", "ld-linux-x86-64"}
    symbols = (line.split() for line in done.stdout.splitlines() if " GLOBAL " in line or " WEAK " in line)
    exported = {words[-1].split("@")[0] for words in symbols if "UND" not in words}
    assert exported == {"getCreators", "setLoggerFinder", "mla2dsa_last_error", "mla2dsa_plugin_version"}
