"""The console's log: one JSON object a line, only ever appended.

Owns the file and its form. A line is written before the console acts on what it says, so
whatever a console knew or acknowledged is in the log.

Forms, each with `t`, the monotonic time in seconds:

- `{"do":"send","tag":n,"topic":…,"text":…,"expiry":s|null}`: published;
- `{"do":"puback","tag":n}`: the broker took it;
- `{"do":"heard","topic":…,"text":…,"retain":bool}`: a message came;
- `{"do":"note","what":…, …}`: what else a reader should know, such as a fault.
"""

import json
import threading
import time
from pathlib import Path
from typing import Any


class Journal:
    """An append-only file of JSON lines; thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()

    def write(self, do: str, **values: Any) -> float:
        """Append a line and return its time."""
        with self._lock:
            now = time.monotonic()
            self._file.write(json.dumps({"t": round(now, 6), "do": do, **values}) + "\n")
            return now

    def note(self, what: str, **values: Any) -> float:
        """Append a remark and return its time."""
        return self.write("note", what=what, **values)

    def close(self) -> None:
        """Flush and close the file."""
        with self._lock:
            self._file.close()
