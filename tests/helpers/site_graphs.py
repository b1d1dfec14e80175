"""The one site of a hand-written attention, and a program that also returns what is built for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from handwritten import Model, export
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from mla2dsa.passes.graph.editor import GraphBuilder, ProgramEditor
from mla2dsa.passes.matching.sites import MlaSite
from mla2dsa.passes.mla_to_dsa import prepare

Make = Callable[[GraphBuilder, MlaSite], dict[str, Node]]


def site_in(model: Model) -> tuple[ProgramEditor, MlaSite]:
    editor, found, _ = prepare(export(model))
    (site,) = found.sites
    return editor, site


def with_built(model: Model, make: Make) -> ExportedProgram:
    """The model's program with the nodes that `make` builds before its attention, returned by name."""
    editor, site = site_in(model)
    for name, node in make(editor.builder(before=site.core.out), site).items():
        editor.add_output(name, node)
    return editor.finish()


def built(model: Model, make: Make, *args: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        result: dict[str, Any] = with_built(model, make).module()(*args)[1]
    return result
