"""Loaded model versions: opening one from its folder, and keeping one copy of each.

Owns the path from a version's folder to something that can run: manifest, digests,
artifact, session, the session's agreement with the manifest, processing, and the
check that rows of a batch are independent; and what is evicted when memory is short. Never
decides when to load or unload otherwise.

Invariants: a `LoadedModel` never changes, but for its row limit, and may be used by any thread;
a version is loaded once however many threads ask for it at the same time; loading one model
holds up nobody who uses another, and no other load but one that the budget has no room for;
a pinned or busy model is never evicted; a failed load leaves nothing behind and may be tried
again.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Condition, Lock

import numpy as np

from agent.errors import AgentError
from agent.manifest import MANIFEST_FILE, Manifest, read_manifest, verify_files
from platforms.artifact import ArtifactSpec, TensorSpec
from platforms.errors import ModelLoadError, PlatformError
from platforms.heap import release_freed
from platforms.runtimes.base import DTYPES, Array, Declared, LoadOptions, Runtime, Session
from platforms.runtimes.registry import RUNTIME_FORMATS, get_runtime
from platforms.selection import Preference, select_artifact
from platforms.spec import PlatformSpec
from worker.engine.artifact_cache import ArtifactCache
from worker.engine.memory import (
    MemoryBudget,
    MemoryRecord,
    ReleaseAtEnd,
    read_process_mb,
)
from worker.errors import MemoryBudgetError
from worker.processing.registry import build_postprocessors, build_preprocessor, is_built_in
from worker.processing.step import Postprocessor, Preprocessor

_log = logging.getLogger(__name__)

# Wide enough for kernels that differ by batch size, far below what mixing up rows would do.
_PROBE_RTOL, _PROBE_ATOL = 1e-2, 1e-3


@dataclass(frozen=True)
class ModelKey:
    """Identity of a version on this box: `<repository>/<name>/<version>`."""

    name: str
    version: str
    folder: Path
    """Resolved, so that two repositories, or a staged copy, never get mixed up."""
    stamp: int = 0
    """When its manifest was written, ns: a version removed and added again is another one."""

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelKey":
        """Return the key of the version in `folder`, links such as `current` followed."""
        resolved = folder.resolve()
        try:
            stamp = (resolved / MANIFEST_FILE).stat().st_mtime_ns
        except OSError:
            stamp = 0
        return cls(resolved.parent.name, resolved.name, resolved, stamp)


@dataclass(frozen=True)
class LoadedModel:
    """One model version, ready to run."""

    name: str
    version: str
    """The publisher's release, from the manifest."""
    folder: Path
    artifact: ArtifactSpec
    runtime: str
    provider: str
    """The execution provider that really runs it."""
    load_ms: float
    """From reading the manifest to the end of the batch probe."""
    session: Session
    preprocess: Preprocessor
    postprocess: tuple[Postprocessor, ...]
    is_built_in: bool
    """All postprocessing is ours, which leaves nothing that JSON cannot carry."""
    is_batchable: bool
    """Requests may be stacked on axis 0 and their rows taken apart again."""
    at_end: ReleaseAtEnd = field(default_factory=ReleaseAtEnd, repr=False, compare=False)
    """Last of all fields, so that the session is freed before it acts."""


@dataclass(eq=False, slots=True)
class _Slot:
    """A model version that is loaded, or about to be."""

    future: "Future[LoadedModel]" = field(default_factory=Future)
    record: MemoryRecord | None = None
    reserved_mb: float = 0.0
    """What the budget has for it while it loads; 0 until it may begin."""
    last_used: float = 0.0
    """Monotonic clock, s."""

    @property
    def mb(self) -> float:
        return self.record.mb if self.record is not None else self.reserved_mb

    @property
    def is_loading(self) -> bool:
        return not self.future.done() and self.reserved_mb > 0


Prefer = Callable[[Path, PlatformSpec], Preference | None]
"""From a version's folder and the box to what was measured to be best."""


def _is_never_busy(_key: ModelKey) -> bool:
    return False


class SessionCache:
    """One copy of each loaded model version, shared by all threads, inside a memory budget."""

    def __init__(
        self,
        budget: MemoryBudget | None = None,
        pinned: Collection[str] = (),
        is_busy: Callable[[ModelKey], bool] = _is_never_busy,
        read_mb: Callable[[], float] = read_process_mb,
    ) -> None:
        """Start empty.

        Args:
            budget: for all models together; None: without bounds.
            pinned: names of models that are never evicted.
            is_busy: says whether a version has runs under way or waiting; quick, takes no lock
                that is held around a call of this cache.
            read_mb: what the process takes now.
        """
        self._slots: dict[ModelKey, _Slot] = {}
        self._budget = budget
        self._pinned = frozenset(pinned)
        self._is_busy = is_busy
        self._read_mb = read_mb
        # What a version has taken before is the best guess at what it will take.
        self._records: dict[ModelKey, MemoryRecord] = {}
        self._lock = Lock()
        self._load_ended = Condition(self._lock)
        self.generation = 0
        """Another one whenever a model has gone: who keeps what `find` returned asks again then."""

    def load(self, key: ModelKey, loader: Callable[[], LoadedModel]) -> LoadedModel:
        """Return the model of `key`, calling `loader` if no thread has done so before.

        Blocks while another thread loads the same key, and raises what its loader raised.
        Idle models are evicted, the one least recently used first, where the budget needs it.

        Raises:
            MemoryBudgetError: pinned and busy models leave no room for it.
        """
        with self._lock:
            slot = self._slots.get(key)
            is_mine = slot is None
            if slot is None:
                slot = self._slots[key] = _Slot()
        if is_mine:
            self._fill(key, slot, loader)
        slot.last_used = time.monotonic()
        return slot.future.result()

    def _fill(self, key: ModelKey, slot: _Slot, loader: Callable[[], LoadedModel]) -> None:
        try:
            estimate_mb = self._estimate(key)
            self._admit(key, slot, estimate_mb)
            is_alone = self._is_only_load(slot)
            before_mb = self._read_mb()
            model = loader()
            # What reading a file took: half again of the model, and it would stay for ever.
            release_freed()
            # The first runs are over, too: the loader's probe of the batch axis has made them.
            taken_mb = self._read_mb() - before_mb
            is_alone = is_alone and self._is_only_load(slot)
            # Growth may hide in memory that was free already: the files' size is the least.
            mb = max(taken_mb, _read_artifact_mb(key.folder)) if is_alone else estimate_mb
            record = MemoryRecord(mb, datetime.now(UTC), is_alone)
            with self._lock:
                slot.record = self._records[key] = record
                slot.last_used = time.monotonic()
                slot.future.set_result(model)
                self._load_ended.notify_all()
        except BaseException as exc:
            # Whoever waits must be woken whatever happened here.
            with self._lock:
                if self._slots.get(key) is slot:
                    del self._slots[key]
                slot.future.set_exception(exc)
                self._load_ended.notify_all()
            raise

    def _is_only_load(self, slot: _Slot) -> bool:
        with self._lock:
            return not any(s.is_loading for s in self._slots.values() if s is not slot)

    def _estimate(self, key: ModelKey) -> float:
        known = self._records.get(key)
        return known.mb if known is not None else max(1.0, 1.25 * _read_artifact_mb(key.folder))

    def _admit(self, key: ModelKey, slot: _Slot, need_mb: float) -> None:
        """Reserve memory for a load, evicting idle models; wait where other loads compete."""
        budget = self._budget
        evicted: list[_Slot] = []
        with self._lock:
            while budget is not None:
                excess_mb = self._sum_mb() + need_mb - budget.mb
                evicted += self._evict(excess_mb)
                if self._sum_mb() + need_mb <= budget.mb:
                    break
                if not any(other.is_loading for other in self._slots.values()):
                    if not budget.is_strict and budget.read_available_mb() > 1.25 * need_mb:
                        break
                    raise MemoryBudgetError(self._explain(key, need_mb, budget))
                self._load_ended.wait()
            slot.reserved_mb = need_mb
        if evicted:
            # Outside the lock: letting go of a model takes milliseconds.
            evicted.clear()
            release_freed()

    def _sum_mb(self) -> float:
        return sum(slot.mb for slot in self._slots.values())

    def _evict(self, excess_mb: float) -> list[_Slot]:
        """Forget idle models until `excess_mb` is gone, as far as there are any."""
        idle = sorted(
            (
                (key, slot)
                for key, slot in self._slots.items()
                if slot.future.done() and key.name not in self._pinned and not self._is_busy(key)
            ),
            key=lambda item: item[1].last_used,
        )
        evicted = []
        for key, slot in idle:
            if excess_mb <= 0:
                break
            excess_mb -= slot.mb
            evicted.append(self._slots.pop(key))
            self.generation += 1
            _log.info("%s %s is evicted: %.0f MB", key.name, key.version, slot.mb)
        return evicted

    def _explain(self, key: ModelKey, need_mb: float, budget: MemoryBudget) -> str:
        held = ", ".join(
            f"{other.name} {other.version} ({slot.mb:.0f} MB"
            f"{', pinned' if other.name in self._pinned else ''})"
            for other, slot in self._slots.items()
            if slot.future.done()
        )
        return (
            f"{key.name} {key.version} needs about {need_mb:.0f} MB, and the budget is "
            f"{budget.mb:.0f} MB, held by: {held or 'nothing else'}; raise worker.memory_mb, pin "
            "fewer models, or try again when they are idle"
        )

    def find(self, key: ModelKey) -> LoadedModel | None:
        """Return the model of `key` if it is loaded; does not wait for one that is loading."""
        slot = self._slots.get(key)
        if slot is None or not slot.future.done() or slot.future.exception() is not None:
            return None
        slot.last_used = time.monotonic()
        return slot.future.result()

    def is_loaded(self, key: ModelKey) -> bool:
        """Say whether the model of `key` is loaded, without using it."""
        slot = self._slots.get(key)
        return slot is not None and slot.future.done() and slot.future.exception() is None

    @property
    def budget_mb(self) -> float | None:
        """What all models together may take; None: no bounds."""
        return None if self._budget is None else self._budget.mb

    def find_record(self, key: ModelKey) -> MemoryRecord | None:
        """Return what the model of `key` takes, or took when it was loaded last."""
        return self._records.get(key)

    def unload(self, key: ModelKey) -> bool:
        """Forget the model of `key`; say whether it was there.

        Waits for nobody. Running inferences finish on it: its memory returns to the kernel
        when the last one lets go.
        """
        with self._lock:
            slot = self._slots.pop(key, None)
            self.generation += 1
            self._load_ended.notify_all()
        return slot is not None

    def get_models(self) -> tuple[LoadedModel, ...]:
        """Return the models that are loaded now, in the order they were asked for."""
        slots = tuple(slot.future for slot in tuple(self._slots.values()))
        return tuple(f.result() for f in slots if f.done() and f.exception() is None)


def _read_artifact_mb(folder: Path) -> float:
    """Return the size of the largest file of a version, MB; 0 where it cannot be read."""
    try:
        sizes = [entry.stat().st_size for entry in folder.iterdir() if entry.is_file()]
    except OSError:
        return 0.0
    return max(sizes, default=0) / 10**6


def load_model(
    folder: Path,
    spec: PlatformSpec,
    threads: int,
    cache: ArtifactCache | None = None,
    instances: int = 1,
    prefer: Prefer | None = None,
) -> LoadedModel:
    """Open the model version in `folder` on this box; reads every byte of its files.

    What its runtime finds, such as a fall-back to the CPU, is a warning in the log.

    Args:
        folder: of the version.
        spec: what selection goes by.
        threads: inside one operator.
        cache: of what runtimes prepared of models; None: nothing is kept.
        instances: runs that may go on at once, for runtimes that must know.
        prefer: says what was measured to be best here; None: the publisher's order.

    Raises:
        ManifestError, DigestMismatchError: the folder is not what its manifest says.
        NoArtifactError: none of its artifacts can run here.
        RuntimeMissingError, ModelLoadError: the runtime is not there or refuses the file,
            or the file's tensors are not the manifest's.
        StepError: its processing cannot be set up.
    """
    started = time.perf_counter()
    manifest = read_manifest(folder)
    verify_files(manifest, folder)
    preference = prefer(folder, spec) if prefer is not None else None
    artifacts = manifest.artifact_specs()
    chosen = select_artifact(artifacts, spec, RUNTIME_FORMATS, preference).get_chosen()
    if chosen.runtime is None:
        msg = f"{chosen.artifact.file} was chosen without a runtime: {chosen.reason}"
        raise ModelLoadError(msg)
    path = folder / chosen.artifact.file
    options = LoadOptions(threads=threads, instances=instances)
    session = _load_session(get_runtime(chosen.runtime), path, options, cache, (manifest, spec))
    verify_tensors(manifest, session)
    for finding in session.findings:
        where = f"{manifest.name} {manifest.version} ({path.name} on {session.runtime})"
        _log.warning("%s: %s", where, finding)
    return LoadedModel(
        name=manifest.name,
        version=manifest.version,
        folder=folder,
        artifact=chosen.artifact,
        runtime=session.runtime,
        provider=session.provider,
        session=session,
        preprocess=build_preprocessor(manifest, folder),
        postprocess=build_postprocessors(manifest, folder),
        is_built_in=is_built_in(manifest),
        is_batchable=probe_batching(session),
        load_ms=1000 * (time.perf_counter() - started),
    )


def import_runtime(folder: Path, spec: PlatformSpec, prefer: Prefer | None = None) -> None:
    """Import the library that a version will run on; what is wrong with it, its load says."""
    with suppress(AgentError, PlatformError):
        artifacts = read_manifest(folder).artifact_specs()
        preference = prefer(folder, spec) if prefer is not None else None
        chosen = select_artifact(artifacts, spec, RUNTIME_FORMATS, preference).chosen
        if chosen is not None and chosen.runtime is not None:
            get_runtime(chosen.runtime).version()


def _load_session(
    runtime: Runtime,
    path: Path,
    options: LoadOptions,
    cache: ArtifactCache | None,
    origin: tuple[Manifest, PlatformSpec],
) -> Session:
    manifest, spec = origin
    declared = Declared(
        tuple(entry.to_spec() for entry in manifest.inputs),
        tuple(entry.to_spec() for entry in manifest.outputs),
    )
    if cache is None or not runtime.prepares or not path.is_file():
        return runtime.load(path, options, declared)
    # Not the threads: the optimized graph does not depend on them.
    identity = (
        manifest.model_dump(mode="json"),
        path.name,
        runtime.name,
        runtime.version(),
        (spec.arch, spec.cpu_model, sorted(spec.cpu_flags)),
        options.providers,
    )
    return cache.load(
        identity,
        path.stat().st_size,
        lambda prepared: runtime.load(path, replace(options, prepared=prepared), declared),
    )


def verify_tensors(manifest: Manifest, session: Session) -> None:
    """Check that a session's tensors are the manifest's: names, datatypes, ranks.

    Raises:
        ModelLoadError: they differ.
    """
    sides = (
        ("input", manifest.inputs, session.inputs),
        ("output", manifest.outputs, session.outputs),
    )
    for side, entries, found in sides:
        declared = {entry.name: entry.to_spec() for entry in entries}
        actual = {spec.name: spec for spec in found}
        if declared.keys() != actual.keys():
            msg = f"the manifest declares {side}s {[*declared]}, the model has {[*actual]}"
            raise ModelLoadError(msg)
        for name, spec in declared.items():
            _verify_tensor(side, spec, actual[name])


def _verify_tensor(side: str, declared: TensorSpec, actual: TensorSpec) -> None:
    # A runtime that could not infer an output's shape reports none at all.
    is_unknown = side == "output" and not actual.shape
    is_rank_equal = is_unknown or len(declared.shape) == len(actual.shape)
    if declared.datatype is not actual.datatype or not is_rank_equal:
        msg = (
            f"{side} {declared.name}: the manifest declares {declared.datatype} "
            f"{list(declared.shape)}, the model has {actual.datatype} {list(actual.shape)}"
        )
        raise ModelLoadError(msg)


def probe_batching(session: Session) -> bool:
    """Say whether rows stacked on axis 0 come back one by one, each as if it ran alone.

    A free first axis is no promise: a detector's `[-1, 6]` counts boxes, and taking
    those apart as rows would hand one job the answer of another. So a constant input is
    run as 1 row and as 2; only outputs that grow and repeat with them count as batched.
    """
    if not all(spec.has_free_batch for spec in (*session.inputs, *session.outputs)):
        return False
    try:
        alone = session.run(_make_probe(session.inputs, 1))
        is_batched = _is_repeated(alone, session.run(_make_probe(session.inputs, 2)), 2)
    except PlatformError as exc:
        _log.info("the model does not run on a constant input, so nothing is stacked: %s", exc)
        return False
    if not is_batched:
        _log.info("rows of a batch do not come back one by one, so nothing is stacked")
    return is_batched


def _make_probe(inputs: tuple[TensorSpec, ...], rows: int) -> dict[str, Array]:
    return {
        spec.name: np.full(
            (rows, *(max(axis, 1) for axis in spec.shape[1:])),
            "" if DTYPES[spec.datatype].hasobject else 0,
            dtype=DTYPES[spec.datatype],
        )
        for spec in inputs
    }


def _is_repeated(alone: Mapping[str, Array], stacked: Mapping[str, Array], rows: int) -> bool:
    for name, one in alone.items():
        many = stacked[name]
        if one.shape[:1] != (1,) or many.shape != (rows, *one.shape[1:]):
            return False
        repeated = np.repeat(one, rows, axis=0)
        if one.dtype.hasobject or not np.issubdtype(one.dtype, np.floating):
            is_equal = bool((repeated == many).all())
        else:
            is_equal = np.allclose(repeated, many, _PROBE_RTOL, _PROBE_ATOL, equal_nan=True)
        if not is_equal:
            return False
    return True
