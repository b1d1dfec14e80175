"""The manifests' schemas: what is written is taken, whatever is damaged is named by file and field, in one short line."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dsa_checkpoints import dsa_checkpoint
from manifests import engine_manifest, runnable

from mla2dsa.errors import UserError
from mla2dsa.files.manifests.checkpoint_manifest import CHECKPOINT_MANIFEST, read_checkpoint_manifest
from mla2dsa.files.manifests.engine_manifest import ENGINE_MANIFEST, read_engine
from mla2dsa.files.manifests.export_manifest import EXPORT_MANIFEST, read_export

Edit = Callable[[Any], object]
READERS: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "checkpoint": (CHECKPOINT_MANIFEST, read_checkpoint_manifest),
    "export": (EXPORT_MANIFEST, read_export),
    "engine": (ENGINE_MANIFEST, read_engine),
}


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    place = tmp_path_factory.mktemp("manifests")
    for name in ("model.engine", "libmla2dsa_trt.so"):
        (place / name).write_bytes(b"bytes")
    dsa = dsa_checkpoint("moe", tmp_path_factory)
    digest = {"size": 5, "hashed": 5, "sha256": "0" * 64}
    exported = {
        **runnable(), "kind": "onnx", "file": "model.onnx", "runs_on": ["tensorrt"], "digest": digest,
        "weights": {
            "linked_files": ["m.safetensors"], "zero_copy_bytes": 1, "written_bytes": 2,
            "written": [{"name": "w", "bytes": 2, "reason": "not aligned"}],
        },
    }  # fmt: skip
    exported["source"]["files"] = {"m.safetensors": dict(digest)}
    return {
        "checkpoint": json.loads((dsa / CHECKPOINT_MANIFEST).read_text()),
        "export": exported,
        "engine": engine_manifest(place, "tensorrt-rtx", "1.7", [89]),
    }


def put(path: str, value: Any) -> Edit:
    """Put `value` at caches.0.latent.width."""

    def edit(manifest: Any) -> None:
        *parents, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        for step in parents:
            manifest = manifest[step]
        manifest[last] = value

    return edit


def read(kind: str, content: Any, folder: Path) -> dict[str, Any]:
    file, reader = READERS[kind]
    (folder / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return reader(folder)


@pytest.mark.parametrize("kind", READERS)
def test_a_whole_manifest_is_taken_as_it_is(kind: str, manifests: dict[str, Any], tmp_path: Path) -> None:
    """With what another version may add to it, too."""
    files = [{"name": "plugins/a.program", "size": 5}]
    content = {**manifests[kind], "files": files, "note": {"of": "another version"}}
    assert read(kind, content, tmp_path) == content


RAW = {
    "empty": (b"", "not valid JSON"),
    "list": (b"[]", "expected a JSON object, found list"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "deep-objects": (b'{"format":1,"a":' * 300 + b"1" + b"}" * 300, "nested more than 64 deep"),
    "no-text": (b"\xff\xfe", "not valid JSON"),
    "twice": (b'{"format": 1, "format": 1}', "names format twice"),
    "no-format": (b"{}", "format None, this mla2dsa reads 1"),
    "format-3": (b'{"format": 3}', "format 3, this mla2dsa reads 1"),
    "format-true": (b'{"format": true}', "format True, this mla2dsa reads 1"),
    "format-long": (b'{"format": "%s"}' % (b"x" * 9999), "format xxx"),
    "bare": (b'{"format": 1}', "damaged, versions: Field required"),
}


@pytest.mark.parametrize("fault", RAW)
@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_manifest(kind: str, fault: str, tmp_path: Path) -> None:
    content, part = RAW[fault]
    refused(kind, content, tmp_path, part)


def refused(kind: str, content: Any, folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        read(kind, content, folder)
    line = str(error.value)
    assert line.startswith(str(folder / READERS[kind][0]))
    assert all(part in line for part in parts), line
    assert len(line) < 400
    assert line.isprintable()


OUT = ["/etc/passwd", "../x", "a/../../x", "", ".", "..", "a\0b", "a\nb", "a//b", "x" * 5000, 5, None, ["a"]]
PLAIN = [*OUT, "sub/x", "sub\\x"]
NAMES = {
    "checkpoint": {"source.files.0.name": OUT, "source.files.0.source_name": OUT, "indexer.shard": PLAIN},
    "export": {"file": PLAIN, "weights.linked_files.0": PLAIN},
    "engine": {"plugin.file": PLAIN, "engine.file": PLAIN},
}


@pytest.mark.parametrize(("kind", "path"), [(kind, path) for kind, paths in NAMES.items() for path in paths])
def test_names_stay_in_the_folder(kind: str, path: str, manifests: dict[str, Any], tmp_path: Path) -> None:
    for name in NAMES[kind][path]:
        content = copy.deepcopy(manifests[kind])
        put(path, name)(content)
        refused(kind, content, tmp_path, f"damaged, {path}: ")


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("name", OUT, ids=lambda name: ascii(name)[:20])
def test_listed_files_lie_in_the_folder(kind: str, name: object, manifests: dict[str, Any], tmp_path: Path) -> None:
    refused(kind, {**manifests[kind], "files": [{"name": name, "size": 1}]}, tmp_path, "damaged, files.0.name: ")


FAULTS: dict[str, list[tuple[Edit, str]]] = {
    "checkpoint": [
        (put("source.config", "{}"), "source.config is not the text that was converted"),
        (put("source.config", None), "source.config: Input should be a valid string"),
        (put("source.files.0.size", -1), "source.files.0.size"),
        (put("source.files.0.sha256", "0"), "source.files.0.sha256"),
        (put("source.files.0.source_name", "config.json"), "has a name twice, or config.json"),
        (lambda it: it["source"]["files"].append(it["source"]["files"][0]), "has a name twice"),
        (lambda it: it.pop("source"), "source: Field required"),
        (put("indexer", []), "indexer: "),
        (put("verified", "yes"), "verified: "),
    ],
    "export": [
        (put("kind", "exe"), "kind: Input should be 'onnx' or 'pt2'"),
        (put("dtype", "float16"), "is not what dtype, logits, caches and model say of it"),
        (put("dtype", "int4"), "dtype: "),
        (put("logits", "all"), "inputs and caches list different tensors"),
        (put("limits.max_seq", 10**15), "limits.max_seq: "),
        (put("limits.max_seq", 2000), "limits.max_seq is more than model.context"),
        (put("limits.max_seq", "128"), "limits.max_seq: Input should be a valid integer (found 128)"),
        (put("limits.max_seq", True), "limits.max_seq: Input should be a valid integer"),
        (put("limits", {}), "limits.max_batch: Field required"),
        (put("model.vocab_size", 10), "outputs: logits is not what"),
        (put("caches", []), "caches: "),
        (put("caches.0.index_key", None), "caches: the first layer has no index_key"),
        (lambda it: it["caches"][0].pop("index_key"), "caches.0.index_key: Field required"),
        (put("caches.0.latent.width", 7), "inputs: past_latent_0 is not what"),
        (put("caches.0.latent.input", "past_x"), "not past_X and present_X of one cache"),
        (lambda it: it["caches"].append(it["caches"][0]), "two are of one layer"),
        (lambda it: it["outputs"].reverse(), "the first is not the logits"),
        (lambda it: it["inputs"].pop(), "inputs and caches list different tensors"),
        (put("inputs.0.name", "z" * 99_999), "inputs.0.name: String should have at most 4096"),
        (put("weights.linked_files", ["other"]), "weights.linked_files has other, source.files does not"),
        (put("source.fingerprint", "x"), "source.fingerprint: "),
        (put("digest.size", 1.5), "digest.size: "),
    ],
    "engine": [
        (put("backend.name", "onnxruntime"), "backend.name: "),
        (put("sms", [0]), "sms.0: "),
        (put("sms", "89"), "sms: "),
        (put("profiles", []), "profiles: "),
        (put("profiles.0", {}), "profiles.0.name: Field required"),
        (put("profiles.0.seq", [5, 1, 9]), "profiles.0: expected [least, usual, most]"),
        (put("profiles.0.seq", [1, 2]), "profiles.0.seq: "),
        (put("plugin.embedded", 1), "plugin.embedded: Input should be a valid boolean"),
        (put("plugin", None), "plugin: "),
        (put("engine.sha256", None), "engine.sha256: "),
        (put("ops.SparseMLA.nodes", -1), "ops.SparseMLA.nodes: "),
        (put("model.vocab_size", 12), "outputs: logits is not what"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "edit", "part"), [(kind, *fault) for kind, faults in FAULTS.items() for fault in faults],
    ids=[f"{kind}-{part[:40]}" for kind, faults in FAULTS.items() for _, part in faults],
)  # fmt: skip
def test_damage_is_named(kind: str, edit: Edit, part: str, manifests: dict[str, Any], tmp_path: Path) -> None:
    content = copy.deepcopy(manifests[kind])
    edit(content)
    refused(kind, content, tmp_path, part)
