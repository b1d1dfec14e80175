"""Random SIGKILLs: is the source intact, is nothing half-finished at OUT, does the next run succeed and clear up?

    python benchmarks/kills.py                                   50 kills over convert, export, build and deploy
    python benchmarks/kills.py --kills 4 --only strip,convert    a quick look

Every kill: a command starts on the example model and is killed (the process alone, not its children) at a random moment of the time
it takes, every second time of the last quarter, where files get their names. Then the same command is run to its end, as a person
would: convert with --resume, all of them with --overwrite where OUT was there before.

    source      the model's files are what they were, byte for byte
    OUT         absent or whole after the kill: the same as that of a run that nobody stopped (but for seconds, and the
                engine, which TensorRT does not build twice alike: that it is whole)
    next run    succeeds, and its OUT is the same again: a resumed conversion is one that was never stopped
    left        nothing beside OUT, in the cache or among the temporary files, and no process of the killed run
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from processes import survivors

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny-mla"
RECIPE = "sequence_length: 128\ntokens: 1024\nrows: 32\nindex_topk: 32\nverify: {sequences: 1}\n"
ENGINE = ("--backend", "tensorrt-rtx", "--sm", "80", "--max", "cache_length=256,seq=64", "--jobs", "2")
COMMANDS = ("convert", "export", "build", "deploy", "strip")
STAGES = ("at the start", "locked", "layers", "writing", "published")
_RUNS = ("convert", "export", "build", "deploy", "kernel_packs")  # loaded once, by the process that forks
_DIFFERENT = ("report.json", "model.engine", "layers.json")  # in size, too: seconds, and what TensorRT makes up


@dataclass
class Room:
    """Where all of it happens: the model, what is made of it, OUT, a cache and temporary files of its own."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "room" / "out"

    def command(self, name: str) -> list[str]:
        recipe = ["--recipe", str(self.folder / "recipe.yaml"), "--skip-transformers"]
        source, out = str(self.source(name)), str(self.out)
        return {
            "convert": ["convert", source, out, *recipe],
            "export": ["export", source, out, "--max-seq", "256"],
            "build": ["build", source, out, *ENGINE],
            "deploy": ["deploy", source, out, *recipe, *ENGINE],
            "strip": ["strip", source, out],
        }[name]

    def source(self, name: str) -> Path:
        return self.folder / ("dense" if name in ("convert", "deploy") else "dsa")

    def clear(self) -> None:
        """OUT as new, and a cache that has the plugin and most kernels, but no engine."""
        shutil.rmtree(self.folder / "room", ignore_errors=True)
        self.out.parent.mkdir()
        cache = self.folder / "cache"
        shutil.rmtree(cache / "engines", ignore_errors=True)
        for file in sorted((cache / "kernels").glob("*.bin"))[:1]:
            file.unlink()


@dataclass
class Tally:
    """Of one command."""

    kills: int = 0
    stages: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def set_up(folder: Path) -> Room:
    room = Room(folder)
    shutil.copytree(TINY, folder / "dense", ignore=shutil.ignore_patterns("held_out", "*.py", "__pycache__"))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "tmp").mkdir()
    os.environ.update(
        MLA2DSA_CACHE=str(folder / "cache"), TMPDIR=str(folder / "tmp"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"
    )
    tempfile.tempdir = None
    for name in _RUNS:
        importlib.import_module(f"mla2dsa.optimizer.{name}")
    importlib.import_module("mla2dsa.commands.show.conversion")
    dsa = [
        "convert",
        str(folder / "dense"),
        str(folder / "dsa"),
        "--recipe",
        str(folder / "recipe.yaml"),
        "--skip-transformers",
    ]
    finished(start(dsa, folder / "log"), folder / "log")
    return room


def start(arguments: Sequence[str], log: Path) -> int:
    """`mla2dsa ARGUMENTS` in a child of this process, which has not used torch; its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    atexit._clear()  # what the process that forked is to clear up when it ends
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        from mla2dsa.cli import main

        sys.argv = ["mla2dsa", *arguments]
        code = main(arguments)
        atexit._run_exitfuncs()
    finally:
        os._exit(code)


def wait(child: int, most: float | None = None) -> int | None:
    """The exit code; None if it takes longer."""
    started = time.monotonic()
    while most is None or time.monotonic() - started < most:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def finished(child: int, log: Path) -> float:
    """Its seconds. Raises RuntimeError when it fails."""
    started = time.monotonic()
    code = wait(child)
    if code != 0:
        raise RuntimeError(f"exit code {code}: {log.read_text(errors='replace')[-500:]}")
    return time.monotonic() - started


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file; without what differs between two equal runs, but whether an engine is what its manifest says."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = file.read_bytes()
        if file.name == "model.engine":
            known = json.loads((file.parent / "mla2dsa-engine.json").read_bytes())["engine"]["sha256"]
            data = b"whole" if hashlib.sha256(data).hexdigest() == known else b"damaged"
        elif file.name in _DIFFERENT:
            data = b""
        elif file.suffix == ".json":
            with suppress(ValueError):  # half-written, and then compared as it is
                data = json.dumps(_same(json.loads(data)), sort_keys=True).encode()
        found[str(file.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def _same(value: Any) -> Any:
    if isinstance(value, dict):
        different = {"size"} if value.get("name") in _DIFFERENT else set()
        return {key: _same(item) for key, item in value.items() if key not in different | {"seconds", "engine"}}
    return [_same(item) for item in value] if isinstance(value, list) else value


def left_over(room: Room) -> list[str]:
    """Whatever should not be there once a run has ended well."""
    beside = [path.name for path in room.out.parent.iterdir() if path != room.out]
    hidden = [str(path.relative_to(room.folder)) for path in (room.folder / "cache").rglob(".*")]
    return [
        *beside,
        *hidden,
        *(path.name for path in (room.folder / "tmp").glob("mla2dsa-*")),
    ]  # torch has its own there


def stage(room: Room, was_there: bool, old: dict[str, str]) -> str:
    """How far the killed run had come, by what it left."""
    beside = {path.name.removeprefix(".out.mla2dsa-").partition("-")[0] for path in room.out.parent.iterdir()}
    if room.out.exists() and (not was_there or contents(room.out) != old):
        return "published"
    if "work" in beside:
        return "writing"
    deployed = room.out.parent / ".out.mla2dsa-deploy"
    if "layers" in beside or (deployed.is_dir() and any(deployed.glob(".dsa.mla2dsa-layers/*.safetensors"))):
        return "layers"
    return "locked" if "lock" in beside else "at the start"


def one_kill(
    room: Room, name: str, seconds: float, expected: dict[str, str], chance: random.Random
) -> tuple[str, list[str]] | None:
    """(where it hit, faults); None when the command had ended before."""
    log, source, was_there = room.folder / "log", contents(room.source(name)), name != "strip" and chance.random() < 0.3
    room.clear()
    old = _earlier(room.out) if was_there else {}
    child = start([*room.command(name), *(["--overwrite"] if was_there else [])], log)
    if wait(child, seconds * chance.uniform(0.75 if chance.random() < 0.5 else 0, 1)) is not None:
        return None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    faults = [f"{process} lives on" for process in survivors(child)]
    where = stage(room, was_there, old)
    if room.out.exists() and contents(room.out) not in (old, expected):
        faults.append("OUT is half-finished")
    if name == "strip" and where == "published":
        shutil.rmtree(room.out)  # it is the dense model again, with no manifest, and so never replaced
    again = ["--overwrite"] if room.out.exists() else ["--resume"] if name == "convert" else []
    code = wait(start([*room.command(name), *again], log))
    if code != 0:
        faults.append(f"the next run: exit code {code}, {log.read_text(errors='replace')[-300:]}")
    elif contents(room.out) != expected:
        faults.append("the next run's OUT differs")
    if contents(room.source(name)) != source:
        faults.append("the source was changed")
    return where, faults + [f"left over: {it}" for it in left_over(room)]


def _earlier(out: Path) -> dict[str, str]:
    """What an earlier run wrote there: small, and ours. Returns its contents."""
    from mla2dsa.files.ownership import write_manifest

    (out / "inner").mkdir(parents=True)
    (out / "config.json").write_text("{}")
    (out / "inner" / "weights").write_text("old")
    write_manifest(out, "mla2dsa.json", {"format": 1})
    return contents(out)


def run(
    commands: Sequence[str], kills: int, seed: int, say: Callable[[str], None] = lambda line: None
) -> dict[str, Tally]:
    """The tally of every command, `kills` in all."""
    chance, tallies = random.Random(seed), {name: Tally() for name in commands}
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        room = set_up(Path(place).resolve())
        known: dict[str, tuple[float, dict[str, str]]] = {}
        for number in range(kills):
            name = commands[number % len(commands)]
            if name not in known:
                for _ in range(2 if name in ("build", "deploy") else 1):  # the first fills the cache
                    room.clear()
                    seconds = finished(start(room.command(name), room.folder / "log"), room.folder / "log")
                known[name] = seconds, contents(room.out)
            seconds, expected = known[name]
            while (found := one_kill(room, name, seconds, expected, chance)) is None:
                seconds *= 0.8  # it was faster this time
            where, faults = found
            tally = tallies[name]
            tally.kills, tally.stages[where] = tally.kills + 1, tally.stages[where] + 1
            tally.faults += faults
            say(f"{number + 1}/{kills} {name}: {where}{''.join(f'; {fault}' for fault in faults)}")
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    rows = [["command", "kills", *STAGES, "faults"]]
    for name, tally in tallies.items():
        rows.append([name, str(tally.kills), *(str(tally.stages[it]) for it in STAGES), str(len(tally.faults))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="convert,export,build,deploy", help=f"some of {','.join(COMMANDS)}")
    args = parser.parse_args()
    tallies = run(args.only.split(","), args.kills, args.seed, lambda line: print(line, file=sys.stderr, flush=True))
    print(table(tallies))
    return 1 if any(tally.faults for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
