"""What the box says of its models' updates: the part of `reported` that is not in the repository.

Owns a view of the deployments, of how the last ones ended, of versions marked bad, and of the
console's document; read in the transaction that has changed them, and given out without one.
"""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection

from agent.daemon.convergence import Convergence
from agent.store import deployments as store


class ModelReport:
    """The view, and what is told of it.

    Args:
        convergence: knows the console's document.
    """

    def __init__(self, convergence: Convergence) -> None:
        self._convergence = convergence
        self._view: dict[str, Any] = {}
        self.stamp = 0
        """Another number whenever what is reported has changed."""

    def refresh(self, tx: Connection) -> None:
        """Read again what is reported; inside the transaction that has changed it."""
        self._view = {
            "deployments": {one.model: one for one in store.list_deployments(tx)},
            "states": store.read_states(tx),
            "bad": store.read_bad(tx),
            "desired": self._convergence.read(tx),
        }
        self.stamp += 1

    def describe_followed(self) -> dict[str, Any]:
        """Return which desired document is followed, for a sync."""
        desired = self._view.get("desired")
        if desired is None:
            return {"epoch": None, "desired_version": None}
        return {"epoch": desired.epoch, "desired_version": desired.version}

    def describe(self, models: dict[str, Any]) -> dict[str, Any]:
        """Return the body of `reported`: the models' versions with how their updates stand."""
        view = self._view
        found = {name: dict(entry) for name, entry in models.items()}
        for name, state in view.get("states", {}).items():
            entry = found.setdefault(name, {"active": None, "previous": None, "versions": []})
            entry["status"] = state["status"]
            entry["reason"] = {"code": state["code"], "message": state["message"]}
            entry["last"] = {"release": state["release"], **_shorten(state["detail"])}
        for name, one in view.get("deployments", {}).items():
            entry = found.setdefault(name, {"active": None, "previous": None, "versions": []})
            entry["status"] = "deferred" if "waits" in one.detail else "applying"
            why = one.detail.get("waits") or one.detail.get("message", "")
            entry["reason"] = {"code": one.phase, "message": why}
            entry["candidate"] = {
                "version": one.number,
                "release": one.release,
                "state": one.phase,
                "job_id": one.job_id,
            }
        for digest, bad in view.get("bad", {}).items():
            if bad["model"] in found:
                found[bad["model"]].setdefault("bad", []).append(
                    {"digest": digest, "release": bad["release"], "reason": bad["reason"]}
                )
        return self._convergence.describe(found, view.get("desired"))


def _shorten(detail: Mapping[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in detail.items() if k in ("choice", "probation", "failed_in")}
    copied: dict[str, Any] = json.loads(json.dumps(kept))
    return copied
