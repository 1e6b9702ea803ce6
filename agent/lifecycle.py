"""What an update asks for: release, policy, traffic, probation, window.

The vocabulary that the wire (`update` jobs, the desired document), the staging and the updater
share. Pure: no store, no clock.

Source: docs/lifecycle.md.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from agent.manifest import NAME_PATTERN
from agent.window import Window

NOTICEABLE_MS = 1.0
"""A p95 that is larger by less is noise, or nobody's trouble, however many times it is."""
_WHOLE = 100.0


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Policy(_Wire):
    """What a candidate must keep to on this box; a key that is left out is not looked at."""

    objective: Literal["latency_p95", "throughput", "memory", "energy"] | None = None
    """In place of the manifest's."""
    max_rss_mb: float | None = Field(default=None, gt=0)
    """What runtime and model may add to a process."""
    max_p95_ms: float | None = Field(default=None, gt=0)
    """Of a single row."""
    min_agreement: float | None = Field(default=None, ge=0, le=1)
    """Share of answers that are the active version's, too."""
    max_slowdown: float = Field(default=2.0, gt=0)
    """p95 over the active version's, measured side by side."""
    require_golden: bool = False
    """Refuse a version that brings no golden set."""


class Probation(_Wire):
    """How long a new version is watched before it is committed, and what ends it early."""

    duration_s: float | None = Field(default=None, ge=0, le=30 * 86_400)
    """None: as the box is set (`updates.probation_s`)."""
    requests: int = Field(default=0, ge=0)
    """Commit needs at least so many answers of the candidate; 0: the time is enough."""
    max_error_rate: float = Field(default=0.01, ge=0, le=1)
    """Failed runs over all; faults of the request itself do not count."""
    min_failures: int = Field(default=3, ge=1)
    """Fewer failed runs than this never end a probation."""
    max_slowdown: float = Field(default=2.0, gt=0)
    """p95 over the previous version's in its last minutes."""
    max_growth_mb: float = Field(default=256.0, gt=0)
    """Memory of the serving process, over what it had when the probation began."""
    min_agreement: float | None = Field(default=None, ge=0, le=1)
    """In shadow: share of answers that are the active version's."""
    hang_s: float = Field(default=30.0, gt=0)
    """A run of the candidate that lasts longer hangs."""


class Rollout(_Wire):
    """How a new version gets its traffic on this box."""

    shadow_s: float = Field(default=0.0, ge=0, le=30 * 86_400)
    """Before it answers anybody it sees copies for so long."""
    shadow_percent: float = Field(default=100.0, gt=0, le=100)
    canary: tuple[Annotated[float, Field(gt=0, lt=100)], ...] = Field(default=(), max_length=20)
    """Shares of the traffic, rising; each lasts its part of the probation."""

    @model_validator(mode="after")
    def _check(self) -> "Rollout":
        if list(self.canary) != sorted(self.canary):
            msg = "the shares of a canary rise"
            raise ValueError(msg)
        return self


class UpdateParams(_Wire):
    """The `params` of an `update` job."""

    policy: Policy = Policy()
    probation: Probation = Probation()
    rollout: Rollout = Rollout()
    window: Window | None = None
    """When the new version may be activated; it is fetched and staged at any time."""
    force: bool = False
    """Try again what failed here before."""
    bundle: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """File below `inbox`/_releases that the release is in; None: the box's source has it."""


class Phase(StrEnum):
    """Where an update is, by its wire name."""

    WAITING = "waiting"
    """Staged; its window is closed, or nobody has looked yet."""
    SHADOW = "shadow"
    CANARY = "canary"
    ACTIVATING = "activating"
    PROBATION = "probation"
    COMMITTING = "committing"
    ROLLING_BACK = "rolling_back"


Release = Annotated[str, Field(pattern=NAME_PATTERN)]


class DesiredModel(UpdateParams):
    """What a console wants of one model."""

    release: Release | None
    """None: the model is to be removed."""
    traffic: dict[Release, Annotated[float, Field(ge=0, le=100)]] = Field(default_factory=dict)
    """Shares of releases that are here, for an A/B test that lasts; together 100."""

    @model_validator(mode="after")
    def _check_traffic(self) -> "DesiredModel":
        if self.traffic and abs(sum(self.traffic.values()) - _WHOLE) > 1e-6:
            msg = "the shares of traffic are 100 together"
            raise ValueError(msg)
        return self


class Desired(_Wire):
    """The console's retained document."""

    epoch: str = Field(min_length=1, max_length=64)
    version: int = Field(ge=1)
    models: dict[Release, DesiredModel] = Field(default_factory=dict)
    window: Window | None = None
    """Of models that have none of their own."""
