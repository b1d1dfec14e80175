"""The example model with a chat template, opened once: what the tests of `generate`, `serve` and `compare` share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from places import TINY

from mla2dsa.optimizer.answers import opened

TEMPLATE = (
    "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}def {% endif %}"
)
_MADE: dict[str, Any] = {}


def chatty_model(factory: pytest.TempPathFactory) -> Path:
    """The dense example model with a chat template: only read it."""
    if "folder" not in _MADE:
        folder = Path(shutil.copytree(TINY, factory.mktemp("chat") / "tiny-chat"))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
        _MADE["folder"] = folder
    made: Path = _MADE["folder"]
    return made


def open_once(patch: pytest.MonkeyPatch) -> None:
    """Checkpoints with the same weights share a session: the capture is most of the time of a short answer."""
    original = opened.open_torch_session

    def again(folder: Path, *others: Any, **options: Any) -> Any:
        key = str(sorted((file.name, file.stat().st_size) for file in folder.glob("*.safetensors")))
        if key not in _MADE:
            _MADE[key] = original(folder, *others, **options)
        return _MADE[key]

    patch.setattr(opened, "open_torch_session", again)


def greedy(folder: Path, ids: list[int], count: int) -> str:
    """transformers' own words."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0, len(ids) :]
    return str(AutoTokenizer.from_pretrained(folder).decode(made))
