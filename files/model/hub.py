"""A model by its hub id: all of it for a conversion, and for a plan no more than its words and the headers of its weights.

A header says what a shard holds, at its beginning: a plan of a model of 700 GB fetches some megabytes. They become a folder whose
shards are as long as the real ones and have no content (sparse files), so that whoever plans sees a checkpoint like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import SeveralErrors, UserError
from ..json_files import read_json
from ..safetensors_index import INDEX_FILE, SINGLE_FILE, header_bytes
from ..temporary import scratch_folder
from ..writing import create, write_new
from .model_files import CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, is_folder

_OTHER_FORMATS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data"]
_WORDS = (CONFIG, INDEX_FILE, GENERATION_CONFIG, TOKENIZER_CONFIG, "hf_quant_config.json", "chat_template.jinja")
_AT_ONCE = 8  # requests; the hub's own client takes as many


def download(model: str, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The folder of a hub id in the hub's cache, all files fetched (with the hub's own progress bars). Raises UserError."""
    from huggingface_hub import snapshot_download

    with _told(model, revision):
        return Path(
            snapshot_download(
                model, revision=revision, local_files_only=local_files_only, ignore_patterns=_OTHER_FORMATS
            )
        )


@contextmanager
def planned_folder(model: str) -> Iterator[str]:
    """`model` itself where it is a folder; of a hub id a folder of what a plan reads, gone when the block ends, or the hub's cache
    where the hub is not reached. Raises UserError; what is said of the folder in the block is said of the id."""
    if is_folder(model):
        yield model
        return
    with scratch_folder("headers") as made:
        folder = made
        try:
            with _told(model, None):
                _fetch(model, made)
        except _NotReached:
            folder = download(model, local_files_only=True)
        try:
            yield str(folder)
        except UserError as error:
            error.args = (str(error).replace(str(folder), model),)
            if isinstance(error, SeveralErrors):
                error.lines = [line.replace(str(folder), model) for line in error.lines]
            raise


class _NotReached(UserError):
    """The hub does not answer, or is not to be asked."""


def _fetch(model: str, folder: Path) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    hub = HfApi()
    about = hub.model_info(model)
    names = {file.rfilename for file in about.siblings or ()}
    for name in sorted(names.intersection(_WORDS)):
        write_new(folder / name, Path(hf_hub_download(model, name, revision=about.sha)).read_bytes())
    shards = _shards(folder, names)
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        found = threads.map(lambda name: hub.parse_safetensors_file_metadata(model, name, revision=about.sha), shards)
        for name, header in zip(shards, found, strict=True):
            _write_shard(folder / name, header.tensors)


def _shards(folder: Path, names: Iterable[str]) -> list[str]:
    """Of the weights' files those that the index names; what is missing is said by who reads the folder."""
    if SINGLE_FILE in names:
        return [SINGLE_FILE]
    weight_map = read_json(folder / INDEX_FILE).get("weight_map") if (folder / INDEX_FILE).is_file() else None
    files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    return sorted(files.intersection(names))


def _write_shard(file: Path, tensors: Mapping[str, Any]) -> None:
    """tensors: by name, with dtype, shape and data_offsets, as huggingface_hub tells a header."""
    ordered = sorted(tensors.items(), key=lambda item: tuple(item[1].data_offsets))
    head = header_bytes({name: (one.dtype, tuple(one.shape)) for name, one in ordered}, {"format": "pt"})
    end = max((one.data_offsets[1] for one in tensors.values()), default=0)
    with create(file) as stream:
        stream.write(head)
        stream.truncate(len(head) + end)


@contextmanager
def _told(model: str, revision: str | None) -> Iterator[None]:
    """What the hub's client raises, as one line."""
    from huggingface_hub import errors

    where = f"{model} (revision {revision})" if revision else model
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(f"{where}: gated; ask for access on its hub page, then log in (`hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{where}: the hub has the model but not that revision") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{where}: no such folder, and not found on the hub (private? `hf auth login`)") from None
    except errors.HFValidationError:
        raise UserError(f"{model}: no such folder, and not a hub id (owner/name)") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise _NotReached(
            f"{where}: not a folder, not in the hub cache, hub not reached; check name and network"
        ) from None
    except errors.SafetensorsParsingError as error:
        raise UserError(f"{where}: a header of its weights is damaged ({str(error).splitlines()[0]})") from None
    except (errors.HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: no such folder, and the hub did not answer ({reason})") from error
    except Exception as error:  # of the client's own transport, whichever that is
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise
        raise _NotReached(
            f"{where}: no such folder, and the hub was not reached ({type(error).__name__}: {error})"
        ) from error
