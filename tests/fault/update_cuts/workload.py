"""The run that is recorded: installations, updates, a roll-back, a removal.

    python -m tests.fault.update_cuts.workload ROOT SOURCE [--plant DEFECT]

`ROOT/data` is the box. Before and after each step a line goes to `ROOT/marks`: which release of
each model may be the active one from now on, and which jobs have been told to have ended.
"""

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any

import agent.fileio
from tests.fault.update_cuts.box import QuietBox
from tests.harness.clocks import FakeClock

DEFECTS = ("no-folder-sync", "no-file-sync", "link-in-two-steps")


class Run:
    """Plays the steps and says what it may be held to."""

    def __init__(self, root: Path, source: Path) -> None:
        self._marks = (root / "marks").open("a", encoding="utf-8")
        self.box = QuietBox(root, source, FakeClock())
        self._ended: list[str] = []
        self._active: dict[str, list[str | None]] = {"digits": [None], "other": [None]}
        self.box.begin()

    def mark(self, model: str, *releases: str | None) -> None:
        """Say which release of a model may be active from here on."""
        self._active[model] = list(releases)
        self._marks.write(json.dumps({"active": self._active, "ended": self._ended}) + "\n")
        self._marks.flush()

    def update(self, number: int, model: str, release: str, before: str | None) -> None:
        job_id = f"job-{number}"
        self.mark(model, before, release)
        self.box.ask(job_id, model, release)
        self.box.work(job_id, model, release)
        assert self.box.finish()
        self._ended.append(job_id)
        self.mark(model, release)

    def fail(self, number: int, model: str, release: str, before: str) -> None:
        """Update to a version that crashes in its probation."""
        job_id = f"job-{number}"
        self.mark(model, before, release)
        self.box.ask(job_id, model, release)
        self.box.work(job_id, model, release)
        while self.box.repository.get_version(model).release != release:
            assert self.box.step()
        self.box.crash(model, self.box.repository.get_version(model).number)
        assert self.box.finish()
        self._ended.append(job_id)
        self.mark(model, before)

    def play(self) -> None:
        self.update(1, "digits", "1.0.0", None)
        self.update(2, "digits", "2.0.0", "1.0.0")
        self.fail(3, "digits", "3.0.0", "2.0.0")
        self.mark("digits", "2.0.0", "1.0.0")
        self.box.repository.activate("digits", "1.0.0")
        self.mark("digits", "1.0.0")
        self.update(4, "other", "1.0.0", None)
        self.update(5, "digits", "4.0.0", "1.0.0")
        self.mark("other", "1.0.0", None)
        self.box.repository.remove("other")
        self.mark("other", None)
        self.box.close()


def plant(defect: str) -> None:
    """Make the product worse, to show that a walk finds it."""

    def skip(*_: Any) -> None:
        """Do nothing."""

    def relink(link: Path, target: str) -> None:
        """Point a link elsewhere in two steps."""
        link.unlink(missing_ok=True)
        agent.fileio.fsync_dir(link.parent)
        link.symlink_to(target)
        agent.fileio.fsync_dir(link.parent)

    patches: dict[str, dict[str, Any]] = {
        "no-folder-sync": {"agent.repository.fsync_dir": skip, "agent.fileio.fsync_dir": skip},
        "no-file-sync": {
            "agent.repository.fsync_tree": skip,
            "worker.update.partfile.os": _NoSync(),
        },
        "link-in-two-steps": {"agent.repository.replace_link": relink},
    }
    for place, replacement in patches[defect].items():
        module, _, name = place.rpartition(".")
        setattr(importlib.import_module(module), name, replacement)


class _NoSync:
    """`os` without its fsync."""

    def __getattr__(self, name: str) -> Any:
        return (lambda _fd: None) if name == "fsync" else getattr(os, name)


def main() -> None:
    """Play the run once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("--plant", choices=DEFECTS)
    options = parser.parse_args()
    if options.plant:
        plant(options.plant)
    Run(options.root, options.source).play()


if __name__ == "__main__":
    main()
