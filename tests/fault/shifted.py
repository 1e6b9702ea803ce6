"""Starts a command of `edgeward` in a process whose wall clock is wrong.

    python -m tests.fault.shifted FILE agent

FILE is a JSON object that may be replaced at any time: `offset_s` is added to the wall clock,
and `boot`, where it is given, is the kernel's boot id. It is looked at every 20 ms, so the
clock jumps while the process runs. Everything in the process that asks Python for the wall
time sees the jump: the agent, and also ids, logs, Celery, kombu and paho. The monotonic clock
and files' times stay as they are.

Housekeeping runs each moment instead of each half minute, so that whatever a wrong clock makes
it do happens in a test; where `hurry` is false, it runs as shipped.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

_LOOK_S = 0.02
_TICK_S = 0.1


class Shift:
    """What the file says.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked_s = 0.0
        self._said: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        """Return what it says now, or said a moment ago."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= _LOOK_S:
            self._said, self._looked_s = json.loads(self._path.read_text()), now_s
        return self._said

    @property
    def offset_s(self) -> int:
        """What is added to the wall clock."""
        return int(self.read().get("offset_s", 0))


def write_shift(
    path: Path, offset_s: int, boot: str | None = None, *, is_hurried: bool = True
) -> None:
    """Let the clocks of the processes that were started with this file jump."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"offset_s": offset_s, "boot": boot, "hurry": is_hurried}))
    part.replace(path)


def shift_clocks(shift: Shift) -> None:
    """Patch this process; before anything else is imported that could hold the functions."""
    right_s, right_ns = time.time, time.time_ns
    time.time = lambda: right_s() + shift.offset_s
    time.time_ns = lambda: right_ns() + shift.offset_s * 1_000_000_000


def hurry(shift: Shift) -> None:
    """Let housekeeping and the status file come often, and the boot be what the file says."""
    import agent.clock
    from agent.daemon import supervisor

    boot_id = agent.clock._read_boot_id

    def read_boot_id() -> str:
        return str(shift.read().get("boot") or boot_id())

    agent.clock._read_boot_id = read_boot_id  # type: ignore[assignment]
    supervisor._HOUSEKEEPING_S = supervisor._STATUS_S = supervisor._TICK_S = _TICK_S


def main() -> None:
    """Shift this process's clocks, and run the rest as `edgeward` would."""
    shift = Shift(Path(sys.argv.pop(1)))
    shift_clocks(shift)
    if shift.read().get("hurry", True):
        hurry(shift)
    from console.entry import main as run_edgeward

    run_edgeward()


if __name__ == "__main__":
    main()
