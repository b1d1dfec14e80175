"""The files that other programs read: CI, pre-commit, issue forms, metadata."""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import ROOT

FORMS = [file for file in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if file.name != "config.yml"]
ELEMENTS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}  # of GitHub's schema for issue forms


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text())


def form_faults(form: Any) -> list[str]:
    """What GitHub would refuse in an issue form, and what we ask of one."""
    faults = [f"no {key}" for key in ("name", "description", "body") if not form.get(key)]
    body = form.get("body") or []
    for element in body:
        label = element.get("attributes", {}).get("label")
        if element.get("type") not in ELEMENTS:
            faults.append(f"no element is of type {element.get('type')}")
        elif element["type"] != "markdown" and not (label and re.fullmatch(r"[\w-]+", element.get("id", ""))):
            faults.append(f"an element without label or id: {element}")
        if element.get("type") in ("dropdown", "checkboxes") and not element["attributes"].get("options"):
            faults.append(f"{label}: no options")
    ids = [element.get("id") for element in body]
    if len(set(ids)) < len(ids):
        faults.append("an id twice")
    if not any(element.get("validations", {}).get("required") for element in body):
        faults.append("nothing is required")
    return faults


AREA = {"type": "textarea", "id": "a", "attributes": {"label": "A"}, "validations": {"required": True}}


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        pytest.param([], "no body", id="empty"),
        pytest.param([AREA, AREA], "an id twice", id="same id"),
        pytest.param([{**AREA, "validations": {}}], "nothing is required", id="nothing required"),
        pytest.param([{**AREA, "type": "text"}], "no element is of type text", id="unknown type"),
        pytest.param([AREA, {**AREA, "type": "checkboxes", "id": "b"}], "A: no options", id="no options"),
    ],
)
def test_faults_of_a_form_are_seen(body: list[Any], fault: str) -> None:
    assert fault in form_faults({"name": "n", "description": "d", "body": body})


def test_a_form_without_faults() -> None:
    assert form_faults({"name": "n", "description": "d", "body": [AREA]}) == []


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_issue_forms_are_what_github_takes(file: Path) -> None:
    assert form_faults(read(file)) == []


@pytest.mark.parametrize(
    ("form", "command"), [("bug.yml", "mla2dsa env --json"), ("model_family.yml", "mla2dsa plan MODEL --json")]
)
def test_issue_forms_ask_for_what_commands_print(form: str, command: str) -> None:
    labels = {
        element["attributes"].get("label", ""): element.get("validations", {}).get("required", False)
        for element in read(ROOT / ".github" / "ISSUE_TEMPLATE" / form)["body"]
    }
    assert labels[f"Output of `{command}`"]


def test_ci_runs_the_one_script_on_the_oldest_python() -> None:
    workflow = read(ROOT / ".github" / "workflows" / "ci.yml")
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    setup = next(step["with"] for step in steps if step.get("uses", "").startswith("actions/setup-python@"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={setup['python-version']}"
    assert workflow[True].keys() == {"push", "pull_request"}  # YAML 1.1 reads `on` as true


def test_pre_commit_has_no_tools_of_its_own() -> None:
    """A pinned ruff or mypy here would some day differ from the one in constraints.txt."""
    repos = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert {repo["repo"] for repo in repos} == {"local"}
    hooks = [hook for repo in repos for hook in repo["hooks"]]
    assert [(hook["entry"], hook["language"], hook["pass_filenames"]) for hook in hooks] == [
        ("make lint", "system", False)
    ]


def test_metadata_names_no_place_that_is_not_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["authors"]
    assert not any(classifier.startswith("License ::") for classifier in project["classifiers"]), "said by `license`"
    assert all(url.startswith("https://") for url in project.get("urls", {}).values())


def test_what_is_distributed_is_there() -> None:
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    named = [name for command, *names in lines if command in ("graft", "include") for name in names]
    assert ".github" in named
    assert not [name for name in named if not (ROOT / name).exists()]
