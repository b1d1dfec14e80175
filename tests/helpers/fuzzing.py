"""Damaged files of every kind we read, and what the command line makes of them, each in a forked process with limits.

A case is right when the command ends within 10 s of CPU time and 3 GB, not waiting for anything, and either says in one short line
what is wrong (exit code 1 or 2) or succeeds, and then with the result of the undamaged files where there is one.
"""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from mla2dsa.cli import main

SECONDS, WAITING, MEMORY, LINE = 10, 60, 3 * 2**30, 400  # seconds of CPU time: wall time depends on the neighbours
PROMPT = "def main():"
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64 + 1, 10**400, 1e308, -0.5, float("nan"), float("inf"), "", "x", "0", "64",
    "float16", "../../etc/passwd", "/etc/passwd", "a\nb", "a\0b", "\ud800", "\x1b[2J\x07", "A" * 100_000, "a b " * 50_000, [],
    {}, [None], {"a": {"b": 1}}, [[[]]], [1] * 10_000, {str(n): n for n in range(5000)},
)  # fmt: skip
RAW = (
    b"",
    b"\0" * 999,
    b"[]",
    b"null",
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b"\xef\xbb\xbf{}",
    b"\xff\xfe",
    b"9" * 9999,
)


@dataclass(frozen=True)
class Kind:
    """A file to damage. folder: to copy; file: in it; commands: one of them is run, FOLDER and OUT replaced; expected: of stdout
    where the command succeeds. prepare: is called on the copy after the damage, as a patient forger would. before: is called in
    the fork, before the command."""

    folder: Path
    file: str
    commands: tuple[tuple[str, ...], ...]
    damage: Callable[[bytes], st.SearchStrategy[bytes]]
    expected: str | None = None
    prepare: Callable[[Path], object] = lambda folder: None
    before: Callable[[], object] = lambda: None


def document_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something can be damaged; of long lists the first few."""
    if path:
        yield path
    if isinstance(value, dict):
        for name in value:
            yield from document_paths(value[name], (*path, name))
    elif isinstance(value, list):
        for number in range(min(len(value), 5)):
            yield from document_paths(value[number], (*path, number))


@st.composite
def damaged_document(draw: st.DrawFn, text: bytes) -> bytes:
    """JSON with something removed, replaced, doubled or renamed; or other bytes altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(RAW)) if draw(st.booleans()) else draw(damaged_bytes(text))
    document = json.loads(text)
    path = draw(st.sampled_from(list(document_paths(document))))
    parent = document
    for step in path[:-1]:
        parent = parent[step]
    match draw(st.integers(0, 5)):
        case 0:
            del parent[path[-1]]
        case 1:
            other = draw(st.sampled_from(list(document_paths(document))))
            value = document
            for step in other:
                value = value[step]
            parent[path[-1]] = json.loads(json.dumps(value))
        case 2 if isinstance(parent, dict):
            parent[str(draw(st.sampled_from(HOSTILE)))[:300]] = parent.pop(path[-1])
        case 3 if type(parent[path[-1]]) is int:
            parent[path[-1]] += draw(st.sampled_from((-1, 1, 7, 4096)))
        case _:
            parent[path[-1]] = draw(st.sampled_from(HOSTILE))
    return json.dumps(document).encode()


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A few bytes changed, at times cut off."""
    changed = bytearray(data)
    for at, value in draw(
        st.lists(st.tuples(st.integers(0, max(0, len(data) - 1)), st.integers(0, 255)), min_size=1, max_size=20)
    ):
        if changed:
            changed[at] = value
    return bytes(changed[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 4)) == 0 else changed)


@st.composite
def damaged_header(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file whose header says something else, its length in keeping or not."""
    length = int.from_bytes(data[:8], "little")
    header = draw(damaged_document(data[8 : 8 + length]))
    told = draw(st.sampled_from((len(header), len(header), len(header), 0, len(header) + 1, 2**40, 2**63)))
    return told.to_bytes(8, "little") + header + data[8 + length :]


@st.composite
def damaged_archive(draw: st.DrawFn, data: bytes) -> bytes:
    """A `.pt2` with an entry of it damaged, renamed, doubled, added or left out, its checksums in keeping."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged_bytes(data))
    source = zipfile.ZipFile(io.BytesIO(data))
    entries = {name: source.read(name) for name in source.namelist()}
    texts = [name for name in entries if name.endswith(".json")]
    name = draw(st.sampled_from(texts if draw(st.booleans()) else list(entries)))
    match draw(st.integers(0, 5)):
        case 0:
            del entries[name]
        case 1:
            entries[draw(st.sampled_from(("x", "model/x.pkl", "../x", "/x", name + "/x")))] = entries.pop(name)
        case 2:
            entries["model/data/" + draw(st.sampled_from(("weights/model.pt", "constants/opaque_obj_0", "x.so")))] = (
                b"x"
            )
        case _:
            entries[name] = draw((damaged_document if name in texts else damaged_bytes)(entries[name]))
    written = io.BytesIO()
    with zipfile.ZipFile(
        written, "w", draw(st.sampled_from((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,)))
    ) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return written.getvalue()


_TEXTS = (
    "a: &a [x, x]\nb: *a\n", "index_topk: &a [*a]", "!!python/object/apply:os.system ['true']", "[" * 20_000, "{" * 9_000, "<<: 3",
    "tokens: 1e999", "tokens: 2001-99-99", "tokens: " + "9" * 9999, "index_topk: 3\nindex_topk: 64", "zzz: 1", "? [a]\n: b",
    'calibration: "a\\0b"', "calibration: /dev/zero", "indexer: 'donor:'", "rows: .inf", "- 1", "\0", "seed: " + "A" * 90_000,
    "a: " + "x" * 200_000, "verify: {max_loss_delta: .nan}", "distil: {steps: 0.5}", "%YAML 9.9\n---\na: 1", "--- a\n--- b",
)  # fmt: skip


@st.composite
def damaged_recipe(draw: st.DrawFn, data: bytes) -> bytes:
    """YAML that is no recipe, or one with other values."""
    match draw(st.integers(0, 2)):
        case 0:
            return draw(st.sampled_from(_TEXTS)).encode()
        case 1:
            return draw(damaged_bytes(data))
        case _:
            return draw(damaged_document(json.dumps(_RECIPE).encode()))  # JSON is YAML


_RECIPE = {
    "indexer": "closed-form", "index_topk": 64, "index_n_heads": 8, "index_head_dim": 64, "tokens": 2304, "seed": 1, "rows": 64,
    "sequence_length": 192, "distil": {"steps": 3, "lr": 0.001}, "verify": {"sequences": 2, "max_loss_delta": 0.1},
}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a forked command ended. code: None where it had to be killed for its time."""

    code: int | None
    out: str
    err: str
    seconds: float  # of CPU time
    bytes: int


def run(command: list[str], before: Callable[[], object] = lambda: None) -> Ended:
    """`mla2dsa COMMAND` in a fork of this process, within SECONDS and MEMORY beyond what it holds."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _in_child(command, out.fileno(), err.fileno(), before)
        code, usage = _awaited(child)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    seconds = usage.ru_utime + usage.ru_stime
    return Ended(code, texts[0], texts[1], seconds, usage.ru_maxrss * 1024)


def _in_child(command: list[str], out: int, err: int, before: Callable[[], object]) -> None:
    code = 99
    try:
        os.setsid()
        os.dup2(out, 1), os.dup2(err, 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        before()
        code = main(command)
        sys.stdout.flush()
    except BaseException:  # what escapes main is what is looked for
        import traceback

        traceback.print_exc(file=sys.stderr)
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def _awaited(child: int) -> tuple[int | None, resource.struct_rusage]:
    """(exit code, None where it used up its time or waited without doing anything; what it used)."""
    used, limit = -1, 0.0
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGXCPU else code, usage
        now = sum(map(int, Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]))  # utime, stime
        if now != used:
            used, limit = now, time.monotonic() + WAITING
        elif time.monotonic() > limit:
            os.killpg(child, signal.SIGKILL)
            return None, os.wait4(child, 0)[2]
        time.sleep(0.005)


def fault(ended: Ended, expected: str | None) -> str | None:
    """What is wrong with how a command ended, None if nothing."""
    lines = [line for line in re.split(r"[\r\n]+", ended.err) if line.strip()]
    if ended.code is None:
        return f"hangs: {ended.seconds:.1f} s of CPU time"
    if ended.code == 0:
        return None if expected in (None, ended.out) else "succeeds with another result"
    if ended.code not in (1, 2):
        return f"exit code {ended.code}: {' | '.join(lines[-2:])[:300]}"
    if "Traceback" in ended.err or "internal error" in ended.err:
        return "internal error: " + lines[-1][:300]
    if len(lines) != 1 or not lines[0].startswith("mla2dsa: "):
        return f"{len(lines)} lines: {' | '.join(lines)[:300]}"
    if len(lines[0]) >= LINE:
        return f"a line of {len(lines[0])} characters: {lines[0][:300]}"
    if not lines[0].isprintable() or ended.out:
        return f"prints what it should not: {ended.out[:100]!r} {lines[0][:200]!r}"
    return None


def cases(kind: Kind, count: int, seed: int) -> list[tuple[bytes, int]]:
    """`count` damaged files of a kind, and the number of the command that reads each: the same for the same seed."""
    found: list[tuple[bytes, int]] = []
    data = (kind.folder / kind.file).read_bytes()

    @hypothesis.seed(seed)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )  # fmt: skip
    @hypothesis.given(kind.damage(data), st.integers(0, len(kind.commands) - 1))
    def draw(damaged: bytes, number: int) -> None:
        found.append((damaged, number))

    draw()
    return found[:count]


def fuzz(kind: Kind, count: int, seed: int, place: Path) -> list[tuple[str | None, Ended, list[str]]]:
    """(fault, how it ended, command) of each case. place: an empty folder to work in."""
    found = []
    for damaged, number in cases(kind, count, seed):
        folder = place / "in"
        shutil.copytree(kind.folder, folder, symlinks=True, copy_function=_link)
        (folder / kind.file).unlink()
        (folder / kind.file).write_bytes(damaged)
        kind.prepare(folder)
        named = {"FOLDER": str(folder), "OUT": str(place / "out")}
        command = [_replaced(word, named) for word in kind.commands[number]]
        ended = run(command, kind.before)
        expected = kind.expected if command[0] == "generate" else None
        found.append((fault(ended, expected), ended, command))
        for path in place.iterdir():
            shutil.rmtree(path)
    return found


def _link(source: str, target: str) -> None:
    os.link(source, target)


def _replaced(word: str, named: dict[str, str]) -> str:
    for name, path in named.items():
        word = word.replace(name, path)
    return word
