"""Has active versions measured again where what their choice was measured under has changed.

A new runtime, driver, kernel's view of the processor, number of threads or power mode: then the
record of the staging no longer holds, and the engine falls back to the publisher's order. This asks
for the same release once more, by an update job like any other, so that it is staged on the box as
it is now. What was measured under the same conditions is not measured again.

Invariants: nothing is asked twice for the same conditions; a version that was never staged, or
whose staging found nothing right, is left alone.
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from agent.choice import compute_digest, find_choice, identify_trial
from agent.config import Settings
from agent.daemon.convergence import SubmitUpdate
from agent.errors import ModelError
from agent.lifecycle import DesiredModel
from agent.platformfile import find_platform
from agent.repository import ModelRepository
from platforms.probe import probe_power_mode
from platforms.spec import PlatformSpec
from platforms.threads import choose_concurrency, compute_sizes

log = logging.getLogger(__name__)

_LOOK_S = 30.0
_ROOT = Path("/")


class Remeasuring:
    """Looks now and then.

    Args:
        settings: of the box.
        repository: of the models.
        submit: puts an update job into the ledger.
        now_s: a monotonic clock.
    """

    def __init__(
        self,
        settings: Settings,
        repository: ModelRepository,
        submit: SubmitUpdate,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._repository = repository
        self._submit = submit
        self._now_s = now_s
        self._next_s = 0.0
        self._asked: dict[str, str] = {}
        """By model: the identity that its measurement was asked for."""

    def step(self, busy: Mapping[str, str]) -> None:
        """Ask for what no longer holds.

        Args:
            busy: models that have an update under way: these are measured by it.
        """
        if not self._settings.updates.remeasure or self._now_s() < self._next_s:
            return
        self._next_s = self._now_s() + _LOOK_S
        spec = find_platform(self._settings.data_dir)
        if spec is None:
            # Somebody is looking at the box just now.
            return
        for name in self._repository.list_models():
            if name not in busy:
                try:
                    self._look(name, spec)
                except (ModelError, OSError) as exc:
                    log.info("%s is not looked at for its choice: %s", name, exc)

    def _look(self, name: str, spec: PlatformSpec) -> None:
        version = self._repository.get_version(name)
        record = find_choice(self._settings.choices_dir, compute_digest(version.folder))
        chosen = record.chosen if record is not None else None
        if chosen is None or chosen.runtime is None:
            return
        concurrency = choose_concurrency(spec.cores, self._settings.worker.concurrency or 0)
        threads, _ = compute_sizes(spec.cores, concurrency)
        mode = probe_power_mode(_ROOT)
        now = identify_trial(chosen.sha256, chosen.runtime, spec, threads, mode)
        if now in (chosen.identity, self._asked.get(name)):
            return
        self._asked[name] = now
        job_id = self._submit(name, DesiredModel(release=version.release), f"remeasure:{name}")
        log.info(
            "%s: release %s was measured under other conditions: job %s measures it again",
            name,
            version.release,
            job_id,
        )
