"""The paths of the fast routes: inference and readiness."""

from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote


class Target(NamedTuple):
    """What a path of the fast way means."""

    action: str
    """`infer` or `ready`."""
    model: str
    version: str | None


@lru_cache(1024)
def parse_target(raw_path: bytes) -> Target | None:
    """Return what a path of the fast way means; None for any other."""
    parts = [unquote(part) for part in raw_path.decode("latin-1").split("/")]
    match parts:
        case ["", "v2", "health", ("live" | "ready") as what]:
            return Target("ready", "", what)
        case ["", "v2", "models", model, ("infer" | "ready") as action] if model:
            return Target(action, model, None)
        case ["", "v2", "models", model, "versions", version, ("infer" | "ready") as action] if (
            model and version
        ):
            return Target(action, model, version)
        case _:
            return None
