"""Model repositories for Triton Inference Server: the files are there, and the configuration is text protobuf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from mla2dsa.errors import UserError
from mla2dsa.exporters.engine.triton_repo import config_text, write_triton_repo

TENSORS = [
    {"name": "input_ids", "dtype": "int64", "shape": ["batch", "seq"]},
    {"name": "past_latent_0", "dtype": "bfloat16", "shape": ["batch", "cache_length", 576]},
]
MANIFEST: dict[str, Any] = {
    "inputs": TENSORS,
    "outputs": [
        {"name": "logits", "dtype": "float16", "shape": ["batch", 1, 1024]},
        {"name": "probability", "dtype": "float32", "shape": ["batch"]},
    ],
    "profiles": [{"name": "prefill"}, {"name": "decode"}],
    "engine": {"file": "model.engine"},
    "plugin": {"file": "libmla2dsa_trt.so", "embedded": True},
    "model": {"vocab_size": 1024, "eos_token_id": [0, 7]},
    "backend": {"name": "tensorrt", "version": "10.16.1"},
}
Field = descriptor_pb2.FieldDescriptorProto


def message(name: str, *fields: tuple[str, Any, bool, str]) -> descriptor_pb2.DescriptorProto:
    made = descriptor_pb2.DescriptorProto(name=name)
    for number, (field, kind, repeated, type_name) in enumerate(fields, 1):
        label = Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
        made.field.add(name=field, number=number, type=kind, label=label, type_name=type_name or None)
    return made


@pytest.fixture(scope="module")
def model_config() -> Any:
    """The part of the server's ModelConfig that we write, as a message of its own."""
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="t", syntax="proto3")
    kinds = file.enum_type.add(name="DataType")
    for number, name in enumerate(["TYPE_INVALID", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_BF16"]):
        kinds.value.add(name=name, number=number)
    where = file.enum_type.add(name="Kind")
    for number, name in enumerate(["KIND_AUTO", "KIND_GPU"]):
        where.value.add(name=name, number=number)
    tensor = (
        ("name", Field.TYPE_STRING, False, ""),
        ("data_type", Field.TYPE_ENUM, False, ".t.DataType"),
        ("dims", Field.TYPE_INT64, True, ""),
    )
    file.message_type.append(message("Tensor", *tensor))
    group = (
        ("count", Field.TYPE_INT32, False, ""),
        ("kind", Field.TYPE_ENUM, False, ".t.Kind"),
        ("profile", Field.TYPE_STRING, True, ""),
    )
    file.message_type.append(message("Group", *group))
    file.message_type.append(message("Text", ("string_value", Field.TYPE_STRING, False, "")))
    entry = message("Entry", ("key", Field.TYPE_STRING, False, ""), ("value", Field.TYPE_MESSAGE, False, ".t.Text"))
    file.message_type.append(entry)
    config = (
        ("name", Field.TYPE_STRING, False, ""),
        ("platform", Field.TYPE_STRING, False, ""),
        ("max_batch_size", Field.TYPE_INT32, False, ""),
        ("input", Field.TYPE_MESSAGE, True, ".t.Tensor"),
        ("output", Field.TYPE_MESSAGE, True, ".t.Tensor"),
        ("instance_group", Field.TYPE_MESSAGE, True, ".t.Group"),
        ("parameters", Field.TYPE_MESSAGE, True, ".t.Entry"),
    )
    file.message_type.append(message("ModelConfig", *config))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))


def test_the_configuration_is_that_of_the_engine(model_config: Any) -> None:
    config = text_format.Parse(config_text(MANIFEST, "tiny"), model_config())
    assert (config.name, config.platform, config.max_batch_size) == ("tiny", "tensorrt_plan", 0)
    found = [(it.name, it.data_type, list(it.dims)) for it in config.input]
    assert found == [("input_ids", 1, [-1, -1]), ("past_latent_0", 4, [-1, -1, 576])]
    found = [(it.name, it.data_type, list(it.dims)) for it in config.output]
    assert found == [("logits", 2, [-1, 1, 1024]), ("probability", 3, [-1])]
    assert [(it.key, it.value.string_value) for it in config.parameters] == [("eos_token_id", "0,7")]
    assert [(group.count, group.kind, list(group.profile)) for group in config.instance_group] == [(1, 1, ["0", "1"])]


def test_a_model_that_says_no_end(model_config: Any) -> None:
    endless = {**MANIFEST, "model": {"eos_token_id": []}}
    assert not text_format.Parse(config_text(endless, "tiny"), model_config()).parameters


def test_the_repository_has_all_that_the_server_reads(tmp_path: Path) -> None:
    (tmp_path / "model.engine").write_bytes(b"plan")
    write_triton_repo(tmp_path, MANIFEST, tmp_path / "repo", "tiny")
    assert (tmp_path / "repo" / "tiny" / "1" / "model.plan").read_bytes() == b"plan"
    assert (tmp_path / "repo" / "tiny" / "config.pbtxt").read_text() == config_text(MANIFEST, "tiny")
    readme = (tmp_path / "repo" / "README.md").read_text()
    assert "version-compatible=true" in readme
    assert "tensorrt 10.16.1" in readme


def test_a_plan_without_the_plugin_is_refused(tmp_path: Path) -> None:
    bare = {**MANIFEST, "plugin": {"file": "libmla2dsa_trt.so", "embedded": False}}
    with pytest.raises(UserError, match="the plan does not contain the plugin library; build it with --embed-plugin"):
        write_triton_repo(tmp_path, bare, tmp_path / "repo", "tiny")
    assert not (tmp_path / "repo").exists()
