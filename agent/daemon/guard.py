"""Guard: which model versions may be served, as everybody but the writer asks it.

Keeps the quarantine in memory. Jobs name a version by number, by release or not
at all; only where something of that model is in quarantine is the repository
asked which number is meant.
"""

from collections.abc import Mapping

from agent.errors import ModelError, QuarantinedError
from agent.repository import ModelRepository
from agent.store.quarantine import ModelVersion


class Guard:
    """Answers whether a version is served. Thread-safe.

    Args:
        repository: knows the versions of models.
    """

    def __init__(self, repository: ModelRepository) -> None:
        self._repository = repository
        self._blocked: Mapping[ModelVersion, str] = {}

    def update(self, blocked: Mapping[ModelVersion, str]) -> None:
        """Take over the quarantine as it is now."""
        self._blocked = dict(blocked)

    def describe(self) -> dict[str, dict[str, str]]:
        """Return the versions in quarantine by model, with why."""
        found: dict[str, dict[str, str]] = {}
        for (model, version), why in self._blocked.items():
            found.setdefault(model, {})[version] = why
        return found

    def verify(self, model: str, version: str | None) -> None:
        """Return where a version may be served.

        Raises:
            QuarantinedError: it crashed its workers too often.
        """
        blocked = self._blocked
        if not any(name == model for name, _ in blocked):
            return
        try:
            number = str(self._repository.get_version(model, version).number)
        except ModelError:
            # What is not there is somebody else's error.
            return
        why = blocked.get((model, number))
        if why is not None:
            msg = (
                f"version {number} of {model!r} is not served: it {why}; activate another one, "
                f"or trust it again with `edgeward models trust {model} {number}`"
            )
            raise QuarantinedError(msg)
