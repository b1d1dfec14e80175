"""What the manifests of our folders have in common: each has one schema, and every reader goes through it.

Strict, since a manifest may come from anywhere: types as JSON has them, sizes within reason, names that stay in the folder.
Keys that no schema knows are kept: a newer mla2dsa may write more of the same format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ...errors import UserError, short
from ..json_files import read_json
from ..regular import is_inside, is_plain_name

_MOST_ENTRIES = 200_000


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError("expected the name of a file in the same folder")
    return name


def _inside(name: str) -> str:
    if not is_inside(name):
        raise ValueError("expected a relative path inside of the folder")
    return name


FileName = Annotated[str, AfterValidator(_plain)]
RelativePath = Annotated[str, AfterValidator(_inside)]
Text = Annotated[str, Field(max_length=4096)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, lt=2**31)]
Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Entries = Field(max_length=_MOST_ENTRIES)


class Strict(BaseModel):
    """A part of a manifest."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class Digest(Strict):
    """See `digests.file_digest`."""

    size: Bytes
    hashed: Bytes
    sha256: Sha256


class ListedFile(Strict):
    """A file of the folder, as it was when the folder was published."""

    name: RelativePath
    size: Bytes


class Manifest(Strict):
    """format: the version of the schema. files: all of the folder's but the manifest itself."""

    format: int
    versions: Annotated[dict[Text, Text], Entries]
    files: Annotated[list[ListedFile], Entries] | None = None


def read_manifest(file: Path, schema: type[BaseModel], formats: int | tuple[int, ...], remedy: str) -> dict[str, Any]:
    """The content of `file`, which is as `schema` says. remedy: what to do about one that is not; formats: the versions that are
    read.

    Raises UserError, one line with the file and the field.
    """
    content = read_json(file)
    found = content.get("format")
    known = formats if isinstance(formats, tuple) else (formats,)
    if type(found) is not int or found not in known:
        reads = " and ".join(map(str, known))
        raise UserError(f"{file}: format {short(found)}, this mla2dsa reads {reads}; {remedy}, or update mla2dsa")
    check_schema(content, str(file), schema, remedy)
    return content


def check_schema(content: object, where: str, schema: type[BaseModel], remedy: str) -> None:
    """Raises UserError with the first thing in `content` that is not as `schema` says."""
    try:
        schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = short(".".join(map(str, first["loc"])))
        given = "" if first["type"] == "missing" or not field else f" (found {short(first['input'], 60)})"
        message = short(first["msg"].removeprefix("Value error, "))
        raise UserError(f"{where}: damaged, {field + ': ' if field else ''}{message}{given}; {remedy}") from None
