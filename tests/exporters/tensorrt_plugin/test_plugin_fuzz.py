"""Programs and kernels that are wrong in any way never crash the host: run under AddressSanitizer and UBSan, in a process apart.

A case is all that TensorRT does with a plugin: create, shapes, workspace, clone, attach, onShapeChange, enqueue. Each has to be
taken, or refused with a reason.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import plugin_samples as real
import pytest
from plugin_harness import case, has_sanitizers, replay
from plugin_texts import TYPES, kernels, shapes, text

pytestmark = pytest.mark.skipif(not has_sanitizers(), reason="the compiler has no sanitizers")
NUMBERS = [
    "0",
    "1",
    "-1",
    "2",
    "15",
    "65535",
    "65536",
    str(2**31 - 1),
    str(2**31),
    str(2**63 - 1),
    str(-(2**63)),
    str(2**64),
]
CASES = 800


def test_real_plugins_run_clean(tmp_path: Path) -> None:
    """Every op, every form, at shapes from one token to a long prefill."""
    cases = []
    for name, op in real.OPS.items():
        program, bundle, _ = real.fields(name)
        for sizes in real.SIZES:
            inputs = [tuple(tensor.shape) for tensor in real.tensors(op, *sizes)]
            outputs = [tuple(size.value(inputs) for size in dims) for _, dims in op.outputs]
            kinds = [*(kind for kind, _ in op.inputs), *(kind for kind, _ in op.outputs)]
            cases.append(case(op.op, program, bundle, kinds, len(inputs), [*inputs, *outputs]))
    assert set(replay(cases, tmp_path)) == {"ok"}


def test_the_plugin_made_by_hand_runs_clean(tmp_path: Path) -> None:
    cases = [
        case("SparseMLA", text(), kernels(), TYPES, 3, shapes(*sizes))
        for sizes in ((1, 1, 1, 1), (2, 5, 9, 3), (9, 0, 1, 4))
    ]
    assert replay(cases, tmp_path) == ["ok"] * 3


def _lines(program: bytes, chance: random.Random) -> bytes:
    """Lines left out, doubled, or exchanged."""
    lines = program.split(b"\n")
    at, other = (chance.randrange(len(lines)) for _ in range(2))
    choice = chance.randrange(4)
    if choice == 0:
        del lines[at]
    elif choice == 1:
        lines.insert(at, lines[other])
    elif choice == 2:
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines = lines[:at]
    return b"\n".join(lines)


def _words(program: bytes, chance: random.Random) -> bytes:
    """Words left out, or exchanged with one from anywhere else."""
    lines = [line.split(b" ") for line in program.split(b"\n")]
    words = [word for line in lines for word in line]
    line = chance.choice(lines)
    at = chance.randrange(len(line))
    if chance.random() < 0.3:
        del line[at]
    else:
        line[at] = chance.choice(words)
    return b"\n".join(b" ".join(line) for line in lines)


def _some(pattern: bytes, program: bytes, chance: random.Random) -> re.Match[bytes]:
    """One of the places where it matches; the end, if none."""
    found = list(re.finditer(pattern, program)) or list(re.finditer(rb"$", program))
    return chance.choice(found)


def _numbers(program: bytes, chance: random.Random) -> bytes:
    """A number somewhere becomes one at the edge of what fits."""
    place = _some(rb"\d+", program, chance)
    return program[: place.start()] + chance.choice(NUMBERS).encode() + program[place.end() :]


def _operators(program: bytes, chance: random.Random) -> bytes:
    place = _some(rb"[-+*/^<>,@.]", program, chance)
    return (
        program[: place.start()]
        + chance.choice([b"+", b"-", b"*", b"/", b"^", b"<", b">", b",", b""])
        + program[place.end() :]
    )


def _bytes(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def _cut(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] if chance.random() < 0.5 else data[:at] + data[at + chance.randrange(1, 40) :]


def _rubbish(data: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(chance.randrange(0, 200))


OF_PROGRAMS: list[Callable[[bytes, random.Random], bytes]] = [
    _lines,
    _words,
    _numbers,
    _operators,
    _bytes,
    _cut,
    _rubbish,
]
OF_KERNELS: list[Callable[[bytes, random.Random], bytes]] = [_bytes, _cut, _rubbish]


def _wrong(chance: random.Random) -> Iterator[bytes]:
    """Mutants of programs and kernels, also of several mutations, at shapes that may not fit."""
    for number in range(CASES):
        program, bundle, sizes = (
            text(),
            kernels(),
            shapes(*(chance.choice([0, 1, 2, 7, 2**31, 2**62]) for _ in range(4))),
        )
        if number % 3 == 0:
            bundle = chance.choice(OF_KERNELS)(bundle, chance)
        else:
            for _ in range(chance.randrange(1, 4)):
                program = chance.choice(OF_PROGRAMS)(program or b"x", chance) or b"x"
        if chance.random() < 0.6:
            sizes = shapes()
        yield case("SparseMLA", program, bundle or b"x", TYPES, 3, sizes)


@pytest.mark.parametrize("seed", range(2))
def test_wrong_plugins_are_refused_with_a_reason(seed: int, tmp_path: Path) -> None:
    lines = replay(list(_wrong(random.Random(seed))), tmp_path)
    refused = [line for line in lines if line != "ok"]
    assert len(refused) > CASES / 2
    assert all(re.match(r"(not created|refused): case: .", line) for line in refused)


def test_wrong_programs_of_real_ops(tmp_path: Path) -> None:
    """The long expressions of an indexer, with numbers at the edge of what fits."""
    chance = random.Random(0)
    op = real.OPS["indexer-h8-d128-k64"]
    program, bundle, _ = real.fields("indexer-h8-d128-k64")
    inputs = [tuple(tensor.shape) for tensor in real.tensors(op, 2, 7, 300)]
    outputs = [tuple(size.value(inputs) for size in dims) for _, dims in op.outputs]
    kinds = [*(kind for kind, _ in op.inputs), *(kind for kind, _ in op.outputs)]
    cases = []
    for _ in range(300):
        changed = chance.choice([_numbers, _operators, _words])(program, chance)
        cases.append(case(op.op, changed, bundle, kinds, len(inputs), [*inputs, *outputs]))
    lines = replay(cases, tmp_path)
    assert all(line == "ok" or re.match(r"(not created|refused): case: .", line) for line in lines)
    assert any(line != "ok" for line in lines)
