"""A recipe's file: YAML without what a recipe has no use for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ...errors import UsageError, UserError, short
from ...files.regular import read_within

_MOST_BYTES = (
    100_000  # of the file: fixed by what a person writes, of which a recipe with every setting has a hundredth
)


def read_yaml(file: str) -> dict[str, Any]:
    """The fields in it. Raises UsageError for what is no mapping, and for what YAML can do to its reader."""
    try:
        fields = yaml.load(read_within(Path(file), _MOST_BYTES).decode(), _PlainLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: recipe cannot be read ({error})") from None
    except UserError as error:
        raise UsageError(f"recipe cannot be read: {error}") from None
    except RecursionError:
        raise UsageError(f"{file}: not a recipe, nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that is none
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UsageError(f"{file}: not YAML ({where}{short(str(getattr(error, 'problem', None) or error))})") from None
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise UsageError(f"{file}: expected a mapping of recipe fields")
    return fields


class _PlainLoader(yaml.SafeLoader):
    """YAML without what a recipe has no use for: aliases, whose expansion knows no bounds, and keys that are there twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not taken", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            raise yaml.MarkedYAMLError(problem="a field is there twice", problem_mark=node.start_mark)
        return found
