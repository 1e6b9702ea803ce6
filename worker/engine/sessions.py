"""Loaded model versions: opening one from its folder, and keeping one copy of each.

Owns the path from a version's folder to something that can run: manifest, digests,
artifact, session, the session's agreement with the manifest, processing, and the
check that rows of a batch are independent. Never decides when to load or unload.

Invariants: a `LoadedModel` never changes and may be used by any thread; a version is
loaded once however many threads ask for it at the same time; loading one model holds
up nobody who uses another; a failed load leaves nothing behind and may be tried again.
"""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from agent.manifest import MANIFEST_FILE, Manifest, read_manifest, verify_files
from platforms.artifact import ArtifactSpec, TensorSpec
from platforms.errors import ModelLoadError, PlatformError
from platforms.runtimes.base import DTYPES, Array, LoadOptions, Session
from platforms.runtimes.registry import RUNTIME_FORMATS, get_runtime
from platforms.selection import select_artifact
from platforms.spec import PlatformSpec
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


class SessionCache:
    """One copy of each loaded model version, shared by all threads."""

    def __init__(self) -> None:
        """Start empty."""
        self._slots: dict[ModelKey, Future[LoadedModel]] = {}
        self._lock = Lock()

    def load(self, key: ModelKey, loader: Callable[[], LoadedModel]) -> LoadedModel:
        """Return the model of `key`, calling `loader` if no thread has done so before.

        Blocks while another thread loads the same key, and raises what its loader raised.
        """
        with self._lock:
            slot = self._slots.get(key)
            is_mine = slot is None
            if slot is None:
                slot = self._slots[key] = Future()
        if is_mine:
            self._fill(key, slot, loader)
        return slot.result()

    def _fill(
        self, key: ModelKey, slot: "Future[LoadedModel]", loader: Callable[[], LoadedModel]
    ) -> None:
        try:
            slot.set_result(loader())
        except BaseException as exc:
            # Whoever waits must be woken whatever happened here.
            with self._lock:
                if self._slots.get(key) is slot:
                    del self._slots[key]
            slot.set_exception(exc)
            raise

    def find(self, key: ModelKey) -> LoadedModel | None:
        """Return the model of `key` if it is loaded; does not wait for one that is loading."""
        slot = self._slots.get(key)
        is_there = slot is not None and slot.done() and slot.exception() is None
        return slot.result() if slot is not None and is_there else None

    def unload(self, key: ModelKey) -> bool:
        """Forget the model of `key`; say whether it was there.

        Running inferences finish on it: its memory returns when the last one lets go.
        """
        with self._lock:
            return self._slots.pop(key, None) is not None

    def get_models(self) -> tuple[LoadedModel, ...]:
        """Return the models that are loaded now, in the order they were asked for."""
        found = (self.find(key) for key in tuple(self._slots))
        return tuple(model for model in found if model is not None)


def load_model(folder: Path, spec: PlatformSpec, threads: int) -> LoadedModel:
    """Open the model version in `folder` on this box; reads every byte of its files.

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
    chosen = select_artifact(manifest.artifact_specs(), spec, RUNTIME_FORMATS).get_chosen()
    if chosen.runtime is None:
        msg = f"{chosen.artifact.file} was chosen without a runtime: {chosen.reason}"
        raise ModelLoadError(msg)
    session = get_runtime(chosen.runtime).load(
        folder / chosen.artifact.file, LoadOptions(threads=threads)
    )
    verify_tensors(manifest, session)
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
