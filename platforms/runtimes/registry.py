"""Which inference runtimes exist, said without importing any of them.

Owns the built-in entries and the reading of users' own, which a distribution
announces in the entry-point group `edgeward.runtimes`; each entry point names a
`RuntimeEntry` in a light module, so that the formats are known without the library.

Invariants: importing this module imports no runtime, nor NumPy. A user's entry
point that cannot be read hides no other runtime and is not swallowed: it is in
`read_registry().faults`, it is logged, and asking for it by name says what is wrong.
"""

import importlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from platforms.artifact import ArtifactFormat
from platforms.errors import RuntimeMissingError

if TYPE_CHECKING:
    from platforms.runtimes.base import Runtime

ENTRY_POINT_GROUP = "edgeward.runtimes"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RuntimeEntry:
    """One runtime, declared."""

    name: str
    target: str
    """`package.module:Class` of its `Runtime`, imported when the runtime is used."""
    formats: frozenset[ArtifactFormat]
    extra: str
    """The extra of Edgeward, or the distribution, that brings its library."""


@dataclass(frozen=True)
class Registry:
    """The runtimes that can be asked for, and the announced ones that cannot."""

    entries: Mapping[str, RuntimeEntry]
    faults: Mapping[str, str]
    """Entry-point name → why it cannot be used and what to do about it."""


BUILT_IN: tuple[RuntimeEntry, ...] = (
    RuntimeEntry(
        name="ort",
        target="platforms.runtimes.ort:OrtRuntime",
        formats=frozenset({ArtifactFormat.ONNX}),
        extra="onnx",
    ),
    RuntimeEntry(
        name="litert",
        target="platforms.runtimes.litert:LitertRuntime",
        formats=frozenset({ArtifactFormat.TFLITE}),
        extra="litert",
    ),
    RuntimeEntry(
        name="openvino",
        target="platforms.runtimes.vino:OpenvinoRuntime",
        formats=frozenset(
            {
                ArtifactFormat.OPENVINO,
                ArtifactFormat.ONNX,
                ArtifactFormat.TFLITE,
                ArtifactFormat.SAVED_MODEL,
            }
        ),
        extra="openvino",
    ),
    RuntimeEntry(
        name="torchscript",
        target="platforms.runtimes.torchscript:TorchRuntime",
        formats=frozenset({ArtifactFormat.TORCHSCRIPT, ArtifactFormat.TORCH_EXPORT}),
        extra="torch",
    ),
    RuntimeEntry(
        name="coreml",
        target="platforms.runtimes.coreml:CoremlRuntime",
        formats=frozenset({ArtifactFormat.COREML}),
        extra="convert",
    ),
    RuntimeEntry(
        name="v2",
        target="platforms.runtimes.v2:V2Runtime",
        formats=frozenset({ArtifactFormat.V2}),
        extra="",
    ),
)
"""In order of preference, where two read the same format and nothing has been measured."""


def read_registry() -> Registry:
    """Return the built-in runtimes and those that installed distributions announce."""
    entries = {entry.name: entry for entry in BUILT_IN}
    faults: dict[str, str] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry = _load_entry(point)
        except RuntimeMissingError as exc:
            faults[point.name] = str(exc)
            _log.warning("%s", exc)
            continue
        if entry.name in entries:
            faults[f"{point.name} ({point.value})"] = f"the name {entry.name} is taken"
            continue
        entries[entry.name] = entry
    return Registry(entries, faults)


def _load_entry(point: EntryPoint) -> RuntimeEntry:
    where = f"entry point {point.name} = {point.value} of group {ENTRY_POINT_GROUP}"
    try:
        entry = point.load()
    except Exception as exc:
        # A user's module may raise anything while it is imported.
        msg = f"{where} cannot be loaded: {type(exc).__name__}: {exc}"
        raise RuntimeMissingError(msg) from exc
    if not isinstance(entry, RuntimeEntry) or entry.name != point.name:
        msg = f"{where} must name a RuntimeEntry called {point.name}, not {entry!r}"
        raise RuntimeMissingError(msg)
    return entry


def get_runtime(name: str) -> "Runtime":
    """Return the adapter of the runtime called `name`; its library is not imported yet.

    Raises:
        RuntimeMissingError: no such runtime, or a user's entry or class cannot be loaded.
    """
    registry = read_registry()
    if name in registry.faults:
        raise RuntimeMissingError(registry.faults[name])
    if name not in registry.entries:
        msg = f"there is no runtime {name!r}; known are {', '.join(sorted(registry.entries))}"
        raise RuntimeMissingError(msg)
    entry = registry.entries[name]
    return import_runtime(name, entry.target, entry.extra)


def import_runtime(name: str, target: str, extra: str) -> "Runtime":
    """Return the adapter at `package.module:Class`, whether it is registered or not.

    Raises:
        RuntimeMissingError: it cannot be imported.
    """
    module, _, attribute = target.partition(":")
    try:
        adapter: type[Runtime] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as exc:
        msg = f"runtime {name}: {target} cannot be loaded ({exc}); install {extra}"
        raise RuntimeMissingError(msg) from exc
    return adapter()


class _Formats(Mapping[str, frozenset[ArtifactFormat]]):
    """A live view: a distribution installed later counts from then on."""

    def __getitem__(self, name: str) -> frozenset[ArtifactFormat]:
        return read_registry().entries[name].formats

    def __iter__(self) -> Iterator[str]:
        return iter(read_registry().entries)

    def __len__(self) -> int:
        return len(read_registry().entries)


RUNTIME_FORMATS: Mapping[str, frozenset[ArtifactFormat]] = _Formats()
"""Runtime name → the formats it reads, for artifact selection."""
