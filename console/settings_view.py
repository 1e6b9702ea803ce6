"""Every setting with its value, where that came from, and what it means.

Owns the masking of secrets: a password never leaves here, not even inside a URL.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from agent.config import (
    CONFIG_ENV,
    DEFAULT_CONFIG,
    ENV_DELIMITER,
    ENV_PREFIX,
    Settings,
    read_config,
)
from console.secrecy import MASK, mask_url


@dataclass(frozen=True)
class SettingLine:
    """One setting as a person sees it."""

    key: str
    value: Any
    """JSON-ready; secrets masked."""
    origin: str
    """`default`, `file PATH`, `env NAME` or `flag`."""
    description: str


def find_config_file(named: Path | None) -> Path | None:
    """Return the settings file that is in force, by the order of `agent.config`."""
    if named is not None:
        return named
    if os.environ.get(CONFIG_ENV):
        return Path(os.environ[CONFIG_ENV])
    return DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None


def list_settings(
    settings: Settings, config: Path | None, flags: Mapping[str, Any]
) -> list[SettingLine]:
    """Return all settings in the order in which they are declared.

    Args:
        settings: what is in force.
        config: the settings file that was named on the command line.
        flags: settings that came from flags, nested by section.

    Raises:
        ConfigError: the settings file cannot be read any more.
    """
    path = find_config_file(config)
    document = read_config(path) if path else {}
    lines = []
    for key, value, field in _walk(settings):
        if _is_in(flags, key):
            origin = "flag"
        elif name := find_variable(key, os.environ):
            origin = f"env {name}"
        elif _is_in(document, key):
            origin = f"file {path}"
        else:
            origin = "default"
        lines.append(SettingLine(key, mask(value), origin, field.description or ""))
    return lines


def _walk(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, FieldInfo]]:
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _walk(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value, field


def _is_in(document: Mapping[str, Any], key: str) -> bool:
    head, _, rest = key.partition(".")
    if head not in document:
        return False
    return not rest or (isinstance(document[head], Mapping) and _is_in(document[head], rest))


def find_variable(key: str, environ: Mapping[str, str]) -> str | None:
    """Return the environment variable that sets `key`, or None.

    A section may come whole, as JSON: `EDGEWARD_MQTT='{"host": "broker"}'`.
    """
    wanted = ENV_PREFIX + key.replace(".", ENV_DELIMITER)
    section, _, rest = key.partition(".")
    for name, text in environ.items():
        if name.upper() == wanted.upper():
            return name
        if rest and name.upper() == (ENV_PREFIX + section).upper() and _is_in(_parse(text), rest):
            return name
    return None


def _parse(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def mask(value: Any) -> Any:
    """Return a value as JSON may show it, without secrets."""
    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, str):
        return mask_url(value)
    if isinstance(value, tuple | list):
        return [mask(item) for item in value]
    return str(value) if isinstance(value, Path) else value
