"""What watched versions do, for the agent's gate: counts, latencies, runs that hang.

Owns the reading of the engine's counters for versions that `traffic.json` says are watched.
Decides nothing: that is the agent's part.
"""

from dataclasses import dataclass

from agent.tasks import VersionFigures
from worker.engine.engine import Engine
from worker.engine.memory import read_process_mb
from worker.engine.routing import TrafficRouter
from worker.engine.shadow import Shadow
from worker.engine.stats import FailReason, StatsCounter


@dataclass(frozen=True)
class HungRun:
    """A watched version that has been at one run for too long."""

    model: str
    version: str
    lasts_s: float


class EngineWatch:
    """Looks at one engine.

    Args:
        engine: it.
        router: knows what is watched.
        shadow: compares copies.
    """

    def __init__(self, engine: Engine, router: TrafficRouter, shadow: Shadow) -> None:
        self._engine = engine
        self._router = router
        self._shadow = shadow

    def read(self) -> tuple[float, list[VersionFigures]] | None:
        """Return the process's memory, MB, and the figures; None where nothing is watched."""
        watched = {
            (name, str(number))
            for name, traffic in self._router.list_known().items()
            for number in traffic.watch
        }
        if not watched:
            return None
        counters = {(one.name, one.version): one for one in self._engine.list_stats()}
        found = [self._describe(counters[name]) for name in sorted(watched) if name in counters]
        return read_process_mb(), found

    def _describe(self, counter: StatsCounter) -> VersionFigures:
        stats = counter.read()
        counts = self._shadow.read(counter.name, counter.version)
        return VersionFigures(
            model=counter.name,
            version=counter.version,
            success=stats.success.count,
            failed=stats.failures.get(FailReason.BACKEND.value, 0),
            latencies={str(step): count for step, count in counter.read_latencies().items()},
            compared=counts.compared,
            agreed=counts.agreed,
            shadow_failed=counts.failed,
        )

    def find_hung(self) -> HungRun | None:
        """Return a watched version's run that lasts longer than its watch allows."""
        known = self._router.list_known()
        for served in self._engine.list_served():
            traffic = known.get(served.key.name)
            if traffic is None or traffic.hang_s is None:
                continue
            if served.key.version not in {*map(str, traffic.watch)}:
                continue
            lasts_s = served.batcher.find_oldest_run_s()
            if lasts_s > traffic.hang_s:
                return HungRun(served.key.name, served.key.version, lasts_s)
        return None
