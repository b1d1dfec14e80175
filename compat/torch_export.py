"""torch's private names for what a `.pt2` holds (`torch._export.serde`), as `torch.export.load` uses them itself.

`torch.export.load` is not called: it unpickles whatever an archive asks it to. Tensors come from the caller, as tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

SCHEMA_MAJOR = 8  # of the format of programs: torch 2.11 to 2.13


def element_type(number: int) -> torch.dtype:
    """By its number in an archive. Raises KeyError."""
    from torch._export.serde.serialize import deserialize_scalar_type

    found: torch.dtype = deserialize_scalar_type(number)  # type: ignore[arg-type]
    return found


def program_of(
    document: Mapping[str, Any], weights: Mapping[str, Tensor], constants: Mapping[str, Tensor]
) -> ExportedProgram:
    """The program that `document`, the JSON of an archive, describes. Strings in it are taken for code: see
    `runtime/pt2_graph.py`. Raises anything."""
    from torch._export.serde import schema
    from torch._export.serde.serialize import ExportedProgramDeserializer, _dict_to_dataclass

    program = _dict_to_dataclass(schema.ExportedProgram, document)
    loaded: ExportedProgram = ExportedProgramDeserializer().deserialize(program, dict(weights), dict(constants), b"")
    return loaded
