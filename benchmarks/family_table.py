"""What works with which family: every verb on a small checkpoint of each, as the hub stores it, and the table in docs/families.md.

    python benchmarks/family_table.py FOLDER               # checkpoints, one a subfolder: runs all, writes results/family_table.json
    python benchmarks/family_table.py FOLDER --only youtu  # one again; the others' rows stay
    python benchmarks/family_table.py                      # only the table in docs/families.md, from results/family_table.json

A verb counts when what it promises holds: `verify` when every check holds but those of quality, for the models are random;
`generate` when the greedy text is that of transformers' own class of the source (at most index_topk tokens, so everything is selected);
`export` when onnxruntime's is the same, and its logits; `strip` when the source comes back bit for bit. What does not is told with
its reason. The targets that load the result are those that `plan` names for models of the real widths.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mla2dsa.errors import UsageError, UserError
from mla2dsa.exporters.dsa.strip import strip
from mla2dsa.files.json_files import read_json
from mla2dsa.files.model.model_files import left_out, model_files
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.before.binding import target_verdicts
from mla2dsa.optimizer.convert import convert
from mla2dsa.optimizer.export import export
from mla2dsa.optimizer.model.cached_model import open_torch_session
from mla2dsa.optimizer.model.capture import model_class_of, read_config
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.plan import layout_of, prepare
from mla2dsa.optimizer.proof.evaluate import program_inputs
from mla2dsa.optimizer.proof.streamed_model import StreamedModel
from mla2dsa.optimizer.proof.transformers_check import logits, unreadable
from mla2dsa.optimizer.recipe import Recipe
from mla2dsa.optimizer.verify import verify_folders
from mla2dsa.runtime.generation import Sampling, Session, generate, prefill
from mla2dsa.runtime.ort_session import OrtSession

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "family_table.json", ROOT / "docs" / "families.md"
VERBS = ("plan", "convert", "verify", "export", "generate", "strip")
BEGIN, END = "<!-- benchmarks/family_table.py writes from here -->", "<!-- to here -->"
RECIPE = Recipe(index_topk=64, index_n_heads=4, index_head_dim=32, tokens=512, sequence_length=128, rows=16)
QUALITY = re.compile(r"loss increase|KL to|attention mass")
IDS, NEW = list(range(3, 40)), 16  # a prompt, and tokens after it: together no more than index_topk
SIZES = IndexerConfig(index_topk=2048, index_n_heads=64, index_head_dim=128)  # DeepSeek-V3.2's
WIDTHS = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}  # as published: DeepSeek, Kimi, GLM, Youtu, LongCat
Row = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """source: a checkpoint, place: a folder for what is made of it."""

    source: Path
    place: Path
    recipe: Recipe

    @cached_property
    def native(self) -> bool:
        return Checkpoint.open(self.source).is_dsa()

    @property
    def dsa(self) -> Path:
        return self.source if self.native else self.place / "dsa"

    @cached_property
    def text(self) -> list[int]:
        """Greedy, by torch."""
        return greedy(open_torch_session(self.dsa, 1, capacity=64))


def row(source: Path, place: Path) -> Row:
    """layout and targets, and per verb None or why it does not work. place: an empty folder."""
    family = Family(source, place, RECIPE)
    found: Row = {"layout": "native" if family.native else "", "targets": []}

    def attempt(verb: str, work: Callable[[], object], *needs: str) -> None:
        missing = next((need for need in needs if found.get(need)), None)
        try:
            found[verb] = f"after {missing}" if missing else work() and None
        except (UserError, UsageError) as error:
            found[verb] = str(error).replace(str(source), source.name).replace(f"{place}/", "")
        except Exception as error:  # a defect of ours: the table says so
            found[verb] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]

    if family.native:
        found |= dict.fromkeys(("plan", "convert", "verify", "strip"), "already sparse")
    else:
        attempt("plan", lambda: _planned(family, found))
        attempt("convert", lambda: convert(str(source), family.dsa, family.recipe, skip_verification=True), "plan")
        attempt("verify", lambda: _verified(family), "convert")
        attempt("strip", lambda: _stripped(source, family.dsa, place / "dense"), "convert")
    needs = () if family.native else ("convert",)
    attempt("generate", lambda: _generated(family), *needs)
    attempt("export", lambda: _exported(family), *needs)
    return found


def greedy(session: Session) -> list[int]:
    return [token for ids in generate(session, [IDS], NEW, Sampling()) for token in ids if token is not None]


def transformers_greedy(checkpoint: Checkpoint) -> list[int]:
    """Of the model's own class."""
    name = model_class_of(read_config(checkpoint.config), checkpoint.config).__name__
    ids = list(IDS)
    with StreamedModel.of(checkpoint, name) as model:
        for _ in range(NEW):
            ids.append(int(logits(model, program_inputs(torch.tensor(ids))).rows(slice(-1, None))[0].argmax()))
    return ids[len(IDS) :]


def _planned(family: Family, found: Row) -> None:
    plan = prepare(str(family.source), family.recipe).plan
    if plan.refusal:
        raise UserError(plan.refusal)
    found["layout"], found["targets"] = plan.layout, loaded_by(family)


def loaded_by(family: Family) -> list[str]:
    """The targets that load the family at the sizes its models have: some take no others."""
    checkpoint = Checkpoint.open(family.source)
    verdicts = target_verdicts(
        family.source, {**checkpoint.config, **WIDTHS}, checkpoint.tensors, layout_of(checkpoint, family.recipe), SIZES
    )
    return [it.target for it in verdicts if it.loads]


def _verified(family: Family) -> None:
    skip = unreadable(Checkpoint.open(family.source)) is not None
    result = verify_folders(family.source, family.dsa, sequences=2, sequence_length=128, skip_transformers=skip)
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


def _generated(family: Family) -> None:
    checkpoint = Checkpoint.open(family.source)
    if unreadable(checkpoint) is None:
        _same_text("transformers", transformers_greedy(checkpoint), family.text)


def _exported(family: Family) -> None:
    done = export(family.dsa, family.place / "onnx")
    ours = prefill(open_torch_session(family.dsa, 1, capacity=64), [IDS], len(IDS))
    session = OrtSession(done.folder, 1, threads=1)
    gap = float((prefill(session, [IDS], len(IDS)) - ours).abs().max() / ours.abs().max())
    if not gap < 1e-4:
        raise UserError(f"onnxruntime's logits are {gap:.1e} off")
    _same_text("onnxruntime", greedy(OrtSession(done.folder, 1, threads=1)), family.text)


def _same_text(name: str, expected: list[int], text: list[int]) -> None:
    if expected != text:
        raise UserError(f"greedy text is {text}, {name}'s {expected}")


def table(rows: Mapping[str, Row]) -> str:
    """Markdown: a family a line, then the reasons."""
    lines = [
        f"| checkpoint | {' | '.join(VERBS)} | layout | loaded by | what is not there |",
        "|---|" + "---|" * (len(VERBS) + 3),
    ]
    for name, found in sorted(rows.items()):
        cells = ["yes" if found[verb] is None else "-" for verb in VERBS]
        reasons = dict.fromkeys(reason for verb in VERBS if (reason := found[verb]) and not reason.startswith("after "))
        text = "; ".join(reasons).replace("|", "/").replace("\n", " ")
        lines.append(
            f"| {name} | {' | '.join(cells)} | {found['layout'] or '-'} | {', '.join(found['targets']) or '-'} | {text} |"
        )
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
    chosen = options.only or sorted(it.name for it in options.folder.iterdir()) if options.folder else []
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
