"""Updates under way, how the last ones ended, and versions that failed here.

All functions run inside the caller's transaction. What a phase means and who leads from one to
the next is `agent.daemon.updater`'s matter.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, delete, select
from sqlalchemy.dialects.sqlite import insert as upsert

from agent.commands import encode
from agent.lifecycle import UpdateParams
from agent.store.tables import BadVersion, ModelState
from agent.store.tables import Deployment as DeploymentTable

_DEPLOYMENTS = DeploymentTable.__table__  # type: ignore[attr-defined]
_STATES = ModelState.__table__  # type: ignore[attr-defined]
_BAD = BadVersion.__table__  # type: ignore[attr-defined]
_KEEP_BAD = 1000


@dataclass(frozen=True)
class Deployment:
    """A new version on its way; `agent.store.tables.Deployment` says what the columns mean."""

    model: str
    job_id: str
    release: str
    number: int
    digest: str
    previous: int | None
    older: int | None
    phase: str
    params: UpdateParams
    boot_id: str
    since_ms: int
    since_boot_ms: int
    step: int = 0
    detail: Mapping[str, Any] = field(default_factory=dict)


def list_deployments(tx: Connection) -> list[Deployment]:
    """Return all that are under way, by model."""
    rows = tx.execute(select(_DEPLOYMENTS).order_by(_DEPLOYMENTS.c.model)).mappings()
    return [
        Deployment(
            **{
                **row,
                "params": UpdateParams.model_validate_json(row["params"]),
                "detail": json.loads(row["detail"]),
            }
        )
        for row in rows
    ]


def find_deployment(tx: Connection, model: str) -> Deployment | None:
    """Return a model's deployment, or None."""
    return next((one for one in list_deployments(tx) if one.model == model), None)


def save_deployment(tx: Connection, deployment: Deployment) -> None:
    """Write a deployment, in place of what its model had."""
    values = {
        **vars(deployment),
        "params": encode(deployment.params.model_dump(mode="json", exclude_defaults=True)),
        "detail": encode(dict(deployment.detail)),
    }
    statement = upsert(_DEPLOYMENTS).values(**values)
    tx.execute(statement.on_conflict_do_update(index_elements=["model"], set_=values))


def delete_deployment(tx: Connection, model: str) -> None:
    """Forget a model's deployment: it is over."""
    tx.execute(delete(_DEPLOYMENTS).where(_DEPLOYMENTS.c.model == model))


def save_state(tx: Connection, model: str, **values: Any) -> None:
    """Write how a model's last update ended."""
    row = {"model": model, "detail": "{}", **values}
    statement = upsert(_STATES).values(**row)
    tx.execute(statement.on_conflict_do_update(index_elements=["model"], set_=row))


def read_states(tx: Connection) -> dict[str, dict[str, Any]]:
    """Return how each model's last update ended."""
    rows = tx.execute(select(_STATES)).mappings()
    return {row["model"]: {**row, "detail": json.loads(row["detail"])} for row in rows}


def forget_states(tx: Connection, models: Iterable[str]) -> None:
    """Forget how the last updates of these models ended."""
    tx.execute(delete(_STATES).where(_STATES.c.model.in_(list(models))))


def mark_bad(tx: Connection, **values: Any) -> None:
    """Note a version that failed here."""
    statement = upsert(_BAD).values(**values)
    tx.execute(statement.on_conflict_do_update(index_elements=["digest"], set_=values))
    newest = select(_BAD.c.digest).order_by(_BAD.c.since_ms.desc()).limit(_KEEP_BAD)
    tx.execute(delete(_BAD).where(_BAD.c.digest.not_in(newest)))


def forgive(tx: Connection, digest: str) -> bool:
    """Forget that a version failed; say whether it had."""
    return bool(tx.execute(delete(_BAD).where(_BAD.c.digest == digest)).rowcount)


def read_bad(tx: Connection) -> dict[str, dict[str, Any]]:
    """Return the versions that failed here, by digest."""
    return {row["digest"]: dict(row) for row in tx.execute(select(_BAD)).mappings()}
