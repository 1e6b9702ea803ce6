"""What the agent of this box last said of itself, from its status file.

Owns the reading of `run/status.json` and the judgement whether the agent still runs, and
the reading of what a running `edgeward up` says of itself.
"""

import json
import os
from dataclasses import dataclass
from typing import Any

from agent.clock import SystemClock, parse_at
from agent.config import Settings
from console.errors import AgentDownError

STATUS_FILE = "status.json"
"""The agent's `agent.daemon.supervisor.STATUS_FILE`, whose import costs half a second."""
UP_FILE = "up.json"
"""What `edgeward up` runs with: `{pid, flags}`; the commands beside it need no options then."""
STALE_AFTER_MS = 5_000
"""The agent writes every other second; one that is busy for five is not well either."""


@dataclass(frozen=True)
class BoxStatus:
    """The agent's newest status."""

    at_ms: int | None
    """When it was written; None where there is no readable one."""
    is_running: bool
    values: dict[str, Any]
    """As the heartbeat has them: `mqtt`, `queue_broker`, `workers`, `open_jobs`, `outbox`, …"""


def read_status(settings: Settings) -> BoxStatus:
    """Return the newest status, and whether the agent still writes it."""
    try:
        text = (settings.runtime_dir / STATUS_FILE).read_text(encoding="utf-8")
        values: dict[str, Any] = json.loads(text)
        at_ms = parse_at(values["at"])
    except (OSError, ValueError, KeyError):
        return BoxStatus(None, False, {})
    age_ms = SystemClock().wall_ms() - at_ms
    return BoxStatus(at_ms, age_ms < STALE_AFTER_MS, values)


def read_status_time(settings: Settings) -> int | None:
    """Return when the status file was last written, in ns, or None where there is none."""
    try:
        return (settings.runtime_dir / STATUS_FILE).stat().st_mtime_ns
    except OSError:
        return None


def check_running(settings: Settings) -> None:
    """Refuse to go on where no agent runs.

    Raises:
        AgentDownError: there is no fresh status of an agent on this data folder.
    """
    if not read_status(settings).is_running:
        msg = (
            f"no agent runs on {settings.data_dir}: start it with `edgeward up`, or name "
            "another folder with --data-dir"
        )
        raise AgentDownError(msg)


def read_up_flags(settings: Settings) -> dict[str, Any]:
    """Return the settings that a running `edgeward up` was given, nested; empty without one."""
    try:
        document = json.loads((settings.runtime_dir / UP_FILE).read_text(encoding="utf-8"))
        os.kill(document["pid"], 0)
        return dict(document["flags"])
    except PermissionError:
        # It lives, as another user's process.
        return dict(document["flags"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
