"""Traffic: which version of a model answers whom, beside the active one.

Owns `traffic.json` in a model's folder and the pure choice by it. Written by the agent alone,
read by every worker; without the file the active version answers everybody.

Invariants: equal keys get the same version as long as the shares stand, and whoever had the newer
version keeps it when its share grows; shares that are left over are the active version's; a file
that cannot be read counts as none.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agent.fileio import fsync_dir, write_atomic

TRAFFIC_FILE = "traffic.json"
SCHEMA = "edgeward.traffic/v1"
_WHOLE = 100.0
_GOLDEN_RATIO = 0.6180339887498949
_DIGEST_BITS = 64

Number = Annotated[int, Field(ge=1)]
Percent = Annotated[float, Field(ge=0, le=100)]


class Traffic(BaseModel):
    """How the requests of a model that name no version are shared."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    schema_: Literal["edgeward.traffic/v1"] = Field(default="edgeward.traffic/v1", alias="schema")
    shares: Mapping[Number, Percent] = Field(default_factory=dict)
    """Percent by version number; the rest is the active version's."""
    shadow: Number | None = None
    """A version that sees copies and answers nobody."""
    shadow_percent: Percent = 100.0
    fallback: Number | None = None
    """A version that answers where the active one fails."""
    keep: tuple[Number, ...] = ()
    """Versions that stay loaded, so that going back to them takes no time."""
    watch: tuple[Number, ...] = ()
    """Versions whose figures the workers report."""
    hang_s: float | None = Field(default=None, gt=0)
    """A run of a watched version that lasts longer hangs."""

    @model_validator(mode="after")
    def _check(self) -> "Traffic":
        if sum(self.shares.values()) > _WHOLE + 1e-6:
            msg = "the shares of traffic are over 100 together"
            raise ValueError(msg)
        return self

    def choose(self, model: str, key: str, turn: int = 0) -> int | None:
        """Return the version for a request, or None for the active one. Pure.

        Args:
            model: its name: two models share their traffic independently.
            key: equal keys get equal versions; empty: the turn decides.
            turn: the how-manieth request it is; turns are spread evenly.
        """
        if not self.shares:
            return None
        place = _WHOLE * (_hash(model, key) if key else turn * _GOLDEN_RATIO % 1.0)
        # The newest first: as its share grows it takes in more, and lets go of nobody.
        for number in sorted(self.shares, reverse=True):
            place -= self.shares[number]
            if place < 0:
                return number
        return None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)


def _hash(model: str, key: str) -> float:
    data = f"{model}\0{key}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(data, digest_size=_DIGEST_BITS // 8).digest()
    return int.from_bytes(digest, "big") / (1 << _DIGEST_BITS)


def find_traffic(model_folder: Path) -> Traffic | None:
    """Return how a model's traffic is shared; None where the active version has all of it."""
    try:
        return Traffic.model_validate_json((model_folder / TRAFFIC_FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def write_traffic(model_folder: Path, traffic: Traffic | None) -> None:
    """Share a model's traffic from now on; None: the active version has all of it. Durable."""
    path = model_folder / TRAFFIC_FILE
    if traffic is None:
        if path.exists():
            path.unlink()
            fsync_dir(model_folder)
        return
    document = {"schema": SCHEMA, **traffic.to_json()}
    write_atomic(path, json.dumps(document))
