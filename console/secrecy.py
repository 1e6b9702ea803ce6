"""Keeps secrets out of what leaves the box: known ones by their text, others by their looks.

Pure. The last line before a text is written to a bundle, whatever wrote it. Takes rather
too much out than too little.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

MASK = "********"
_SHORTEST = 4
"""A shorter secret would take ordinary words with it; those stand in masked settings only."""
_NAME = r"[\w.-]*(?:password|passwd|passphrase|secret|token|api_?key|credential)[\w.-]*"
_SECRET_NAME = re.compile(_NAME, re.I)
_PUBLIC_NAME = re.compile(r"_file$", re.I)
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?P<user>[^\s:/@\"']*):[^\s\"'<>]*@", re.I)
_ASSIGNED = re.compile(
    rf"(?P<name>{_NAME})(?P<sign>[\"']?\s*[=:]\s*)(?P<value>\"[^\"]*\"|'[^']*'|[^\s,;&}}\]]+)", re.I
)
_BEARER = re.compile(r"\b(?P<kind>bearer|basic)\s+[A-Za-z0-9+/._~=-]{8,}", re.I)
_PEM = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S
)


class Scrubber:
    """Takes secrets out of texts.

    Args:
        secrets: texts that are secret wherever they stand.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = {text for text in secrets if len(text) >= _SHORTEST}
        longest_first = sorted(known, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first))) if known else None

    def scrub(self, text: str) -> str:
        """Return a text without secrets."""
        if self._known is not None:
            text = self._known.sub(MASK, text)
        text = _PEM.sub(MASK, text)
        text = mask_url(text)
        text = _BEARER.sub(rf"\g<kind> {MASK}", text)
        return _ASSIGNED.sub(_mask_assigned, text)

    def scrub_value(self, value: Any) -> Any:
        """Return a JSON value without secrets: by their names, and in every text."""
        if isinstance(value, Mapping):
            return {
                self.scrub(str(key)): MASK
                if is_secret_name(str(key)) and isinstance(item, str)
                else self.scrub_value(item)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.scrub_value(item) for item in value]
        return self.scrub(value) if isinstance(value, str) else value


def mask_url(text: str) -> str:
    """Return a text whose URLs have no passwords, even ones with unescaped signs in them."""
    return _URL.sub(rf"\g<scheme>\g<user>:{MASK}@", text)


def is_secret_name(name: str) -> bool:
    """Say whether what has this name is likely a secret; a file's path is none."""
    return _SECRET_NAME.search(name) is not None and not _PUBLIC_NAME.search(name)


def find_url_secrets(url: str) -> list[str]:
    """Return the password of a URL, as it stands there and as it is meant."""
    try:
        password = urlsplit(url).password
    except ValueError:
        return []
    return [] if not password else [password, unquote(password)]


def _mask_assigned(match: re.Match[str]) -> str:
    if _PUBLIC_NAME.search(match["name"]):
        return match[0]
    value = match["value"]
    quote = value[0] if value[0] in "\"'" and value[-1] == value[0] else ""
    return f"{match['name']}{match['sign']}{quote}{MASK}{quote}"
