"""What works with which family: every verb on a small checkpoint of each, as the hub stores it, and the table in docs/families.md.

    python benchmarks/family_table.py FOLDER               # checkpoints, one a subfolder: runs all, writes results/family_table.json
    python benchmarks/family_table.py FOLDER --only youtu  # one again; the others' rows stay
    python benchmarks/family_table.py                      # only the table in docs/families.md, from results/family_table.json

A verb counts when what it promises holds: `verify` when every check holds but those of quality, for the models are random;
`generate` when a token comes out of torch; `export` when onnxruntime gives the same logits as torch; `strip` when the source
comes back bit for bit. What does not is told with its reason.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mla2dsa.errors import UsageError, UserError
from mla2dsa.exporters.dsa.strip import strip
from mla2dsa.files.json_files import read_json
from mla2dsa.files.model.model_files import left_out, model_files
from mla2dsa.optimizer.convert import convert
from mla2dsa.optimizer.export import export
from mla2dsa.optimizer.model.cached_model import open_torch_session
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.plan import prepare
from mla2dsa.optimizer.proof.transformers_check import unreadable
from mla2dsa.optimizer.recipe import Recipe
from mla2dsa.optimizer.verify import verify_folders
from mla2dsa.runtime.generation import prefill
from mla2dsa.runtime.ort_session import OrtSession

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "family_table.json", ROOT / "docs" / "families.md"
VERBS = ("plan", "convert", "verify", "export", "generate", "strip")
BEGIN, END = "<!-- benchmarks/family_table.py writes from here -->", "<!-- to here -->"
RECIPE = Recipe(index_topk=64, index_n_heads=4, index_head_dim=32, tokens=512, sequence_length=128, rows=16)
QUALITY = re.compile(r"loss increase|KL to|attention mass")
IDS = list(range(3, 40))
Row = dict[str, Any]


def row(source: Path, place: Path) -> Row:
    """layout, and per verb None or why it does not work. place: an empty folder."""
    native = Checkpoint.open(source).is_dsa()
    found: Row = {"layout": "native" if native else ""}
    dsa = source if native else place / "dsa"

    def attempt(verb: str, work: Callable[[], object], *needs: str) -> None:
        missing = next((need for need in needs if found.get(need)), None)
        try:
            found[verb] = f"after {missing}" if missing else work() and None
        except (UserError, UsageError) as error:
            found[verb] = str(error).replace(str(source), source.name).replace(str(place), "")
        except Exception as error:  # a defect of ours: the table says so
            found[verb] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]

    if native:
        found |= dict.fromkeys(("plan", "convert", "verify", "strip"), "already sparse")
    else:
        attempt("plan", lambda: _planned(source, found))
        attempt("convert", lambda: convert(str(source), dsa, RECIPE, skip_verification=True), "plan")
        attempt("verify", lambda: _verified(source, dsa), "convert")
        attempt("strip", lambda: _stripped(source, dsa, place / "dense"), "convert")
    needs = () if native else ("convert",)
    attempt("generate", lambda: _generated(dsa), *needs)
    attempt("export", lambda: _exported(dsa, place / "onnx"), *needs)
    return found


def _planned(source: Path, found: Row) -> None:
    plan = prepare(str(source), RECIPE).plan
    if plan.refusal:
        raise UserError(plan.refusal)
    found["layout"] = plan.layout


def _verified(source: Path, dsa: Path) -> None:
    skip = unreadable(Checkpoint.open(source)) is not None
    result = verify_folders(source, dsa, sequences=2, sequence_length=128, skip_transformers=skip)
    bad = [check for check in result.checks if not check.passed and not QUALITY.search(check.name)]
    if bad:
        raise UserError(f"{bad[0].name}: {bad[0].value:.1e}, {bad[0].detail}")


def _stripped(source: Path, dsa: Path, out: Path) -> None:
    strip(dsa, out)
    kept = {path.name for path in source.iterdir()} - set(left_out(source, model_files(source)))
    weights = {path.name for path in source.glob("*.safetensors*")}
    for name in sorted(kept | weights):
        if (out / name).read_bytes() != (source / name).read_bytes():
            raise UserError(f"{name} is another one")


def _generated(dsa: Path) -> None:
    session = open_torch_session(dsa, 1, capacity=64)
    if not bool(torch.isfinite(prefill(session, [IDS], len(IDS))).all()):
        raise UserError("logits are not finite")


def _exported(dsa: Path, out: Path) -> None:
    done = export(dsa, out)
    ours = prefill(open_torch_session(dsa, 1, capacity=64), [IDS], len(IDS))
    gap = float((prefill(OrtSession(done.folder, 1, threads=1), [IDS], len(IDS)) - ours).abs().max() / ours.abs().max())
    if not gap < 1e-4:
        raise UserError(f"onnxruntime's logits are {gap:.1e} off")


def table(rows: Mapping[str, Row]) -> str:
    """Markdown: a family a line, then the reasons."""
    lines = [f"| checkpoint | {' | '.join(VERBS)} | layout | what is not there |", "|---|" + "---|" * (len(VERBS) + 2)]
    for name, found in sorted(rows.items()):
        cells = ["yes" if found[verb] is None else "-" for verb in VERBS]
        reasons = dict.fromkeys(reason for verb in VERBS if (reason := found[verb]) and not reason.startswith("after "))
        text = "; ".join(reasons).replace("|", "/").replace("\n", " ")
        lines.append(f"| {name} | {' | '.join(cells)} | {found['layout'] or '-'} | {text} |")
    return "\n".join(lines)


def page(text: str, rows: Mapping[str, Row]) -> str:
    """docs/families.md with the table of `rows` in it."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="checkpoints, one a subfolder")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone; the other rows stay as they are")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    rows: dict[str, Row] = read_json(RESULTS) if RESULTS.exists() else {}
    chosen = options.only or sorted(path.name for path in options.folder.iterdir()) if options.folder else []
    for name in chosen:
        place = Path(tempfile.mkdtemp())
        try:
            rows[name] = row(options.folder / name, place)
        finally:
            shutil.rmtree(place)
        print(f"{name}: {', '.join(verb for verb in VERBS if rows[name][verb] is None) or 'nothing'}", flush=True)
    RESULTS.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), rows))
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
