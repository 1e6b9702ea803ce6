"""A bundle for a bug report: a tar.gz of texts, with a manifest of what is in it.

Owns the file. Every text passes the scrubber on its way in; a part that cannot be made is
noted in the manifest and does not keep the others out.
"""

import io
import json
import tarfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.clock import SystemClock, format_ms
from console.secrecy import Scrubber

MANIFEST = "manifest.json"
_MODE = 0o600


class Bundle:
    """One bundle in the making; `write` makes the file.

    Args:
        name: the folder inside the archive.
        scrubber: takes secrets out of everything.
    """

    def __init__(self, name: str, scrubber: Scrubber) -> None:
        self._name = name
        self._scrubber = scrubber
        self._made_ms = SystemClock().wall_ms()
        self._parts: dict[str, bytes] = {}
        self.files: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []

    def collect(self, name: str, what: str, make: Callable[[], Any]) -> None:
        """Add what `make` returns: a text as it is, anything else as JSON.

        Never raises: a failure is noted, with its traceback, and the bundle goes on.
        """
        try:
            self._add(name, what, make())
        # A box that needs a bundle is broken in a way that nobody foresaw.
        except Exception as exc:  # noqa: BLE001
            note = {"error": f"{type(exc).__name__}: {exc}", "traceback": traceback.format_exc()}
            clean = {key: self._scrubber.scrub(text) for key, text in note.items()}
            self.failed.append({"name": name, "what": what, **clean})

    def _add(self, name: str, what: str, content: Any) -> None:
        if isinstance(content, str):
            text = self._scrubber.scrub(content)
        else:
            plain = json.loads(json.dumps(content, default=str))
            clean = self._scrubber.scrub_value(plain)
            text = json.dumps(clean, indent=2, ensure_ascii=False)
        data = text.encode(errors="replace")
        self._parts[name] = data
        self.files.append({"name": name, "what": what, "size_bytes": len(data)})

    def write(self, path: Path, left_out: Mapping[str, str]) -> dict[str, Any]:
        """Write the file, readable by its owner only, and return the manifest.

        Args:
            path: where; replaced in one step.
            left_out: what is not in here, and why.

        Raises:
            OSError: it cannot be written.
        """
        manifest = {
            "made_at": format_ms(self._made_ms),
            "files": self.files,
            "failed": self.failed,
            "left_out": [{"what": what, "why": why} for what, why in left_out.items()],
        }
        part = path.with_name(f".{path.name}.part")
        part.touch(mode=_MODE)
        with tarfile.open(part, "w:gz") as archive:
            text = json.dumps(manifest, indent=2, ensure_ascii=False)
            for name, data in {MANIFEST: text.encode(), **self._parts}.items():
                entry = tarfile.TarInfo(f"{self._name}/{name}")
                entry.size, entry.mode, entry.mtime = len(data), _MODE, self._made_ms // 1000
                archive.addfile(entry, io.BytesIO(data))
        part.replace(path)
        return manifest
