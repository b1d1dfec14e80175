"""StoredNames: what a tensor of the model is called in files, by transformers' own mapping, and in which pieces it lies there."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file
from saved import saved
from torch import Tensor

from mla2dsa.compat.transformers_private import Join, Naming, naming_of
from mla2dsa.errors import UserError
from mla2dsa.optimizer.model.stored_names import StoredNames

FAMILIES = ("deepseek_v3", "axk1", "longcat_flash", "kimi_linear", "bailing_hybrid", "mistral4", "youtu")


def model_and_files(name: str, factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Tensor]]:
    return families.build(name), load_file(saved(name, factory) / "model.safetensors")


def names_of(model: Any, files: dict[str, Tensor]) -> StoredNames:
    return StoredNames.of(naming_of(model), files, {name: tuple(it.shape) for name, it in model.state_dict().items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_laid_one_after_the_other_are_the_tensor(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As `save_pretrained` writes it, which is how the hub has it; nothing is left over."""
    model, files = model_and_files(family, tmp_path_factory)
    names, read = names_of(model, files), set[str]()
    for name, value in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        parts = names.parts(name, tuple(value.shape))
        assert {part: tuple(files[part].shape) for part in parts} == parts
        rows = torch.cat([files[part].flatten() for part in parts])
        assert torch.equal(rows, value.flatten()[: len(rows)]), name
        read |= parts.keys()
    assert files.keys() - read == names.surplus()
    assert bool(names.surplus()) == (family == "longcat_flash")


@pytest.mark.parametrize("family", ["axk1", "longcat_flash", "kimi_linear", "bailing_hybrid"])
def test_the_models_own_names_are_taken_first(family: str) -> None:
    model = families.build(family)
    files = dict(model.state_dict())
    names = names_of(model, files)
    for name, value in files.items():
        assert names.parts(name, tuple(value.shape)) == {name: tuple(value.shape)}
    assert {name for name in files if names.is_stacked(name)} == {it for it in files if ".experts." in it}


def test_what_is_missing_is_still_told(tmp_path_factory: pytest.TempPathFactory) -> None:
    model, files = model_and_files("kimi_linear", tmp_path_factory)
    gone = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    names = names_of(model, {name: value for name, value in files.items() if name != gone})
    name = "model.layers.1.mlp.experts.gate_up_proj"
    missing = names.parts(name, tuple(model.state_dict()[name].shape)).keys() - files.keys()
    assert missing == {"model.layers.1.mlp.experts.3.w3.weight"}


def test_another_operation_is_refused() -> None:
    naming = Naming((), (Join("mlp.gate_up.weight", ("mlp.gate_and_up.weight",), ("Interleave",)),))
    names = StoredNames.of(naming, ["a.mlp.gate_and_up.weight"], {"a.mlp.gate_up.weight": (4, 2)})
    with pytest.raises(UserError, match=r"a.mlp.gate_up.weight: .* mlp.gate_and_up.weight by .*Interleave"):
        names.parts("a.mlp.gate_up.weight", (4, 2))
