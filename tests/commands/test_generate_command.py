"""generate on the command line: chats, stops, several prompts, files of them, sampling as the model's files say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chatty import chatty_model, greedy, open_once
from command_line import TINY, assert_refused, mla2dsa

QUESTION, SYSTEM, COUNT = "sort a list", "Be short.", 12


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatty_model(tmp_path_factory)


@pytest.fixture(scope="module", autouse=True)
def opened_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        open_once(patch)
        yield


def generate(*arguments: object) -> dict[str, Any]:
    done = mla2dsa("generate", *arguments, "--max-new-tokens", COUNT, "--json")
    assert (done.code, done.err) == (0, "")
    return done.json()


def test_a_chat_is_what_transformers_makes_of_it(chatty: Path) -> None:
    from transformers import AutoTokenizer

    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    told = generate(chatty, QUESTION, "--chat", "--system", SYSTEM)
    assert told["text"] == greedy(chatty, ids, COUNT)
    assert told["answers"][0]["prompt_tokens"] == len(ids)
    assert generate(chatty, QUESTION, "--chat")["answers"][0]["prompt_tokens"] < len(ids)


def test_stop_ends_before_its_text(chatty: Path) -> None:
    whole = generate(chatty, "def main():\n")
    assert whole["answers"][0]["finish_reason"] == "length"
    assert whole["answers"][0]["completion_tokens"] == COUNT
    stop = whole["text"][4:7]
    told = generate(chatty, "def main():\n", "--stop", "never seen", f"--stop={stop}")
    assert told["text"] == whole["text"][: whole["text"].index(stop)]
    assert told["answers"][0]["finish_reason"] == "stop"


def test_several_prompts_are_answered_as_each_alone(chatty: Path, tmp_path: Path) -> None:
    lines, plain = tmp_path / "more.jsonl", tmp_path / "one.txt"
    lines.write_text('{"prompt": "import os"}\n\n"class A:"\n')
    plain.write_text("import os")
    together = generate(chatty, "--prompt-file", lines, "def main():")
    assert [it["prompt"] for it in together["answers"]] == ["def main():", "import os", "class A:"]
    assert "text" not in together
    assert together["answers"][1]["text"] == generate(chatty, "--prompt-file", plain)["text"]
    assert together["answers"][2]["text"] == generate(chatty, "class A:")["text"]
    done = mla2dsa("generate", chatty, "a = ", "b = ", "--max-new-tokens", 2)
    assert done.out.startswith("==> a = <==\n")
    assert "\n==> b = <==\n" in done.out


def test_sampling_is_what_the_files_say(chatty: Path, tmp_path: Path) -> None:
    """do_sample with top_k 1 is greedy; without top_k it is not; a flag does without the file."""
    folder = Path(shutil.copytree(chatty, tmp_path / "sampled"))
    greedy_text = generate(chatty, "def main():\n")["text"]
    file, found = folder / "generation_config.json", {"do_sample": True, "temperature": 1.3, "eos_token_id": 0}
    file.write_text(json.dumps({**found, "top_k": 1}))
    assert generate(folder, "def main():\n")["text"] == greedy_text
    file.write_text(json.dumps(found))
    texts = {generate(folder, "def main():\n", "--seed", seed)["text"] for seed in range(3)}
    assert len(texts) > 1
    assert generate(folder, "def main():\n", "--seed", 1)["text"] in texts
    assert generate(folder, "def main():\n", "--temperature", 0)["text"] == greedy_text
    assert generate(folder, "def main():\n", "--temperature", 2, "--top-k", 1)["text"] == greedy_text
    file.write_text(json.dumps({"repetition_penalty": 1.2}))
    assert_refused(mla2dsa("generate", folder, "x"), 1, file, "repetition_penalty is 1.2", "--temperature")


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ([], 2, "no prompt"),
        (["x", "--system", "y"], 2, "--chat"),
        (["-", "-"], 2, "give it once"),
        (["x", "--top-p", "0.5"], 2, "--temperature"),
        (["x", "--stop", ""], 2, "--stop is empty"),
        (["x", "--temperature", "nan"], 2, "--temperature nan, expected 0 (greedy) or more"),
        (["x", "--temperature", "inf"], 2, "--temperature inf, expected"),
        (["x", "--temperature", "-1"], 2, "--temperature -1.0, expected"),
        (["x", "--temperature", "1", "--top-k", "-1"], 2, "--top-k -1, expected"),
        (["x", "--temperature", "1", "--top-p", "nan"], 2, "--top-p nan, expected more than 0"),
        (["x", "--seed", "9" * 40], 2, "expected a number of 64 bits"),
        (["x", "--max-new-tokens", "0"], 2, "--max-new-tokens 0"),
        (["x", "--chat"], 1, "no chat template"),
        (["--prompt-file", "missing.txt"], 1, "missing.txt"),
    ],
    ids=lambda it: " ".join(it) or "nothing" if isinstance(it, list) else None,
)
def test_refusals(arguments: list[str], code: int, part: str) -> None:
    assert_refused(mla2dsa("generate", TINY, *arguments), code, part)


@pytest.mark.parametrize("value", ["nan", "inf", "-0.5"])
def test_serve_says_the_same_of_a_temperature(value: str) -> None:
    assert_refused(mla2dsa("serve", TINY, "--temperature", value), 2, f"--temperature {value}, expected 0 (greedy)")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"", b"3\n", b'{"text": "x"}\n'], ids=["bytes", "empty", "number", "field"]
)
def test_prompt_files_that_are_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(content)
    assert_refused(mla2dsa("generate", TINY, "--prompt-file", tmp_path / "prompts.jsonl"), 1, "prompts.jsonl")
