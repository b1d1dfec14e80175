"""A causal language model of transformers in float32, of which a few layers are in memory at a time.

transformers itself builds, names, converts and fills every part, through `from_pretrained` of the model's own class: once for
what is around the layers, then for a group of layers whenever the model comes to the first of it. What a checkpoint lacks, or
has too much of, is therefore what transformers says of it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import UserError, short
from ...files.model.model_files import GENERATION_CONFIG
from ...files.model.text_model import HOW_IT_RUNS, PREFIXES, is_wrapper
from ...files.safetensors_index import TensorLocation
from ..model.checkpoint import Checkpoint
from ..model.free_memory import give_back
from ..model.stored_formats import block_of

# Fixed by what it can save: the process with torch and transformers takes as much, and one layer of a large model more.
GROUP_BYTES = 512 * 2**20  # of layers that are loaded together, unless one alone is larger
ITEM = 4  # fixed by float32: bytes of an element
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_FAULTS = ("missing_keys", "mismatched_keys", "error_msgs")  # whichever part says so


def groups(layers: Sequence[int], most: int | None = None) -> list[range]:
    """Which layers are loaded together: neighbours of `most` bytes or fewer in all (None: GROUP_BYTES), or one alone."""
    most = GROUP_BYTES if most is None else most
    found: list[range] = []
    held = 0
    for number, size in enumerate(layers):
        if found and held + size <= most:
            found[-1], held = range(found[-1].start, number + 1), held + size
        else:
            found.append(range(number, number + 1))
            held = size
    return found


def loading_bytes(tensors: Iterable[tuple[str, int, int]]) -> int:
    """The most memory that the weights of a model take while it runs. tensors: (name, elements, bytes in its file) of all.

    A group and what is around the layers are in float32, their part of the files is mapped, and of stacked experts there is what they
    are made of, twice: transformers reads them one by one in threads, what a thread freed is not the system's until all are read."""
    around, layers = 0, dict[int, tuple[int, int]]()
    for name, elements, stored in tensors:
        size, found = ITEM * elements, _LAYER.search(name)
        if found is None:
            around += size + stored
            continue
        beside = stored + (2 * size if ".experts." in name else 0)
        whole, more = layers.get(int(found[1]), (0, 0))
        layers[int(found[1])] = whole + size, more + beside
    each = [layers[number] for number in sorted(layers)]
    return around + max((sum(sum(each[n]) for n in group) for group in groups([size for size, _ in each])), default=0)


def tensor_sizes(tensors: Mapping[str, TensorLocation]) -> Iterator[tuple[str, int, int]]:
    """Of a checkpoint, as `loading_bytes` has them."""
    for name, place in tensors.items():
        yield name, math.prod(place.shape), place.nbytes


@dataclass
class StreamedModel:
    """What `from_pretrained` would give, to be called as that, as a context that gives it up at the end.

    Transformers speaks of each part when it is loaded, so `faults` is whole when the model has run once."""

    checkpoint: Checkpoint
    model_class: Any
    _wrong: dict[str, None] = field(default_factory=dict)  # in the order in which it was said
    _unwanted: set[str] | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, class_name: str) -> StreamedModel:
        """Through `class_name` of transformers."""
        import transformers

        return cls(checkpoint, getattr(transformers, class_name))

    def __post_init__(self) -> None:
        self._frame = self._loaded(_frame(self.model_class, self))
        places: list[_Place] = list(self._frame.model.layers)
        self._groups = groups([place.nbytes for place in places])
        self._held: tuple[range, Mapping[int, nn.Module]] = (range(0), {})

    def __call__(self, **inputs: Any) -> Any:
        """The outputs of the model. inputs: as its forward has them."""
        return self._frame(**inputs)

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self._frame.get_output_embeddings()
        return head

    def set_output_embeddings(self, head: nn.Module) -> None:
        self._frame.set_output_embeddings(head)

    def layer(self, number: int) -> nn.Module:
        """The layer with its weights; those of another group are given up first."""
        if number not in self._held[0]:
            self._release()
            group = next(group for group in self._groups if number in group)
            part = self._loaded(_layers_only(self.model_class, group))
            self._held = (group, {number: part.model.layers[number] for number in group})
            give_back()  # what it was made of
        return self._held[1][number]

    def __enter__(self) -> StreamedModel:
        return self

    def __exit__(self, *error: object) -> None:
        self._frame.to("meta")
        self._release()

    def _release(self) -> None:
        """Give up the layers that are held, at once: modules are in cycles, which Python looks for when it likes."""
        for held in self._held[1].values():
            held.to("meta")
        self._held = (range(0), {})
        give_back()

    def faults(self) -> list[str]:
        """What transformers said is wrong with the files: missing, unexpected or mismatched keys. A key is unexpected when no part
        of the model wants it."""
        return [*self._wrong, *(f"unexpected keys: {name}" for name in sorted(self._unwanted or ()))]

    def _hear(self, said: Mapping[str, Any]) -> None:
        self._wrong |= {f"{kind.replace('_', ' ')}: {name}": None for kind in _FAULTS for name in said.get(kind, ())}
        unwanted = set(said.get("unexpected_keys", ()))
        self._unwanted = unwanted if self._unwanted is None else self._unwanted & unwanted

    def _loaded(self, part: Any) -> Any:
        """A part of the model class, filled. Tied weights are in the frame, which has both."""
        checkpoint = self.checkpoint
        known = {
            name: value for name, value in checkpoint.config.items() if name not in {"model_type", *HOW_IT_RUNS}
        }  # the class knows its own type
        config = part.config_class.from_dict(known)
        if part.LAYERS is not None:
            config.tie_word_embeddings = False
        try:
            with quiet():
                model, said = part.from_pretrained(
                    checkpoint.path, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=True,
                    key_mapping=PREFIXES if is_wrapper(checkpoint.whole_config) else None, **_dequantised(checkpoint),
                    **_generating(checkpoint.path),
                )  # fmt: skip
        except Exception as error:  # transformers raises whatever its readers raise
            reason = short((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
            raise UserError(
                f"{checkpoint.path}: transformers does not load it as {part.__name__} ({reason}); mend what it names, or pass "
                "--skip-transformers"
            ) from error
        self._hear(said)
        return model.float().eval()


class _Place(nn.Module):
    """Where a layer belongs: runs the one that its model has there, and else looks like the layer that was built without weights."""

    def __init__(self, owner: StreamedModel, number: int, built: nn.Module) -> None:
        super().__init__()
        self.nbytes = sum(ITEM * parameter.numel() for parameter in built.parameters())
        self._unregistered = (owner, number, built)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        owner, number, _ = self._unregistered
        return owner.layer(number)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_unregistered"][2], name)


def _frame(model_class: Any, owner: StreamedModel) -> Any:
    """The class with a place for each layer."""

    class Frame(model_class):  # type: ignore[misc]
        LAYERS = None

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for number, layer in enumerate(self.model.layers):
                self.model.layers[number] = _Place(owner, number, layer)

    return _named_as(model_class, Frame)


def _layers_only(model_class: Any, group: range) -> Any:
    """The class with the layers of a group, and nothing else that has weights."""

    class Layers(model_class):  # type: ignore[misc]
        LAYERS = group

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            layers = self.model.layers
            for owner, kept in ((self, self.model), (self.model, layers)):
                for name, child in list(owner.named_children()):
                    if child is not kept:
                        delattr(owner, name)
            for number in set(range(len(layers))) - set(group):
                layers[number] = nn.Identity()

    return _named_as(model_class, Layers)


def _named_as(model_class: Any, part: Any) -> Any:
    """transformers keeps how it names and converts tensors by the names of its own classes."""
    for name in ("__name__", "__qualname__", "__module__"):
        setattr(part, name, getattr(model_class, name))
    return part


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, no reports on keys (they are read instead), and no warning on which of two quantization configs counts."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _generating(folder: Path) -> dict[str, Any]:
    """Where there is no generation_config.json, transformers reads those fields from config.json instead, which has another name as
    long as a conversion is not proven. Nothing is generated here: the defaults do."""
    import transformers

    return {} if (folder / GENERATION_CONFIG).exists() else {"generation_config": transformers.GenerationConfig()}


def _dequantised(checkpoint: Checkpoint) -> dict[str, Any]:
    """The argument with which transformers dequantises what it loads."""
    import transformers

    fields = dict(checkpoint.config.get("quantization_config") or {})
    method = fields.pop("quant_method", None)
    if method is None:
        return {}
    if method == "fp8":
        return {
            "quantization_config": transformers.FineGrainedFP8Config(
                dequantize=True, weight_block_size=block_of(checkpoint.config)
            )
        }
    return {"quantization_config": transformers.CompressedTensorsConfig(**{**fields, "dequantize": True})}
