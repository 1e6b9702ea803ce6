"""Reads what the documents say, and words what the code says in the documents' form.

`python -m tests.architecture.documents` prints the settings table of docs/operate.md.
"""

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from agent.config import Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLE_SETTINGS = ROOT / "systemd" / "edgeward.toml.example"

_TYPES = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    SecretStr: "text",
    Path: "path",
}
_BOUNDS = (("gt", ">"), ("ge", "≥"), ("le", "≤"))


def read_document(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def iter_rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of each table row, headers and rules included."""
    for line in text.splitlines():
        if line.lstrip().startswith("|"):
            yield [cell.strip() for cell in line.strip().strip("|").split("|")]


def find_section(text: str, heading: str) -> str:
    """Return a section's text, from its heading to the next one of its level or above."""
    level = heading.split(" ", 1)[0]
    match = re.search(
        rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, re.M | re.S
    )
    assert match is not None, f"there is no section {heading!r}"
    return match[1]


def extract_walk_through() -> str:
    """Return the script of the protocol's walk-through: its blocks, in order."""
    blocks = re.findall(
        r"^```sh walk-through\n(.*?)^```$", read_document("protocol.md"), re.M | re.S
    )
    return "\n".join(blocks)


def iter_settings(
    model: type[BaseModel] = Settings, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted key and the field of each setting; sections themselves are none."""
    for name, found in model.model_fields.items():
        kind = found.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from iter_settings(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, found


def describe_type(found: FieldInfo) -> str:
    kind: Any = found.annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(item for item in get_args(kind) if item is not type(None))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {_TYPES[get_args(kind)[0]]}s"
    bounds = [
        f"{sign} {getattr(item, name):g}"
        for item in found.metadata
        for name, sign in _BOUNDS
        if getattr(item, name, None) is not None
    ]
    return ", ".join([_TYPES[kind], *bounds])


def describe_default(found: FieldInfo) -> str:
    value = found.default
    if found.default_factory is not None:
        return "see meaning"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return "`[]`"
    return f"`{value}`"


def build_settings_rows() -> list[list[str]]:
    """Return the rows of the settings table: key, type, default, meaning."""
    return [
        [f"`{key}`", describe_type(found), describe_default(found), str(found.description)]
        for key, found in iter_settings()
    ]


if __name__ == "__main__":
    print("| setting | type | default | meaning |\n| --- | --- | --- | --- |")
    for row in build_settings_rows():
        print(f"| {' | '.join(row)} |")
