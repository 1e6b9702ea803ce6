"""Which version answers a request that names none: the file of shares, read now and then.

Owns the reading of `traffic.json` for one process and the turn of requests without a key. Both
ways into the engine, the queue's jobs and requests for an answer at once, ask here, so that they
share one traffic.

Invariants: thread-safe; one look at the disk every `WATCH_S` a model, and none in between.
"""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

from agent.traffic import TRAFFIC_FILE, Traffic, find_traffic

WATCH_S = 0.5
"""How long the file's last word is taken for its present one."""


@dataclass(slots=True)
class _Known:
    """What a model's file said."""

    checked: float
    stamp: tuple[int, int]
    traffic: Traffic | None


class TrafficRouter:
    """Says which version answers.

    Args:
        root: the model repository's folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, _Known] = {}
        self._turns = itertools.count()

    def find(self, model: str) -> Traffic | None:
        """Return how a model's traffic is shared; None: the active version answers everybody."""
        known = self._known.get(model)
        now = time.monotonic()
        if known is not None and now - known.checked < WATCH_S:
            return known.traffic
        if "/" in model or model[:1] in ("", "."):
            return None
        return self._look(model, known, now)

    def _look(self, model: str, known: _Known | None, now: float) -> Traffic | None:
        folder = self._root / model
        try:
            status = (folder / TRAFFIC_FILE).stat()
            stamp = (status.st_mtime_ns, status.st_ino)
        except OSError:
            stamp = (0, 0)
        if known is not None and known.stamp == stamp:
            known.checked = now
            return known.traffic
        traffic = find_traffic(folder) if stamp != (0, 0) else None
        # Names that clients made up must not fill the memory.
        if traffic is not None or known is not None or folder.is_dir():
            self._known[model] = _Known(now, stamp, traffic)
        return traffic

    def choose(self, traffic: Traffic, model: str, key: str) -> str | None:
        """Return the version for a request, or None for the active one."""
        number = traffic.choose(model, key, 0 if key else next(self._turns))
        return None if number is None else str(number)

    def list_known(self) -> dict[str, Traffic]:
        """Return the models whose traffic is shared or watched just now."""
        return {
            name: known.traffic
            for name, known in tuple(self._known.items())
            if known.traffic is not None
        }
