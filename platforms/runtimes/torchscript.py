"""PyTorch behind `Runtime`: TorchScript files and exported programs (`.pt2`).

Owns the refusal of everything that would run a stranger's Python or native code: a pickled
module or state dict, an archive with compiled libraries in it, and the pickles inside a
`.pt2`, which torch 2.13 loads with `weights_only=False` when the safe way fails. Against
the last, `TORCH_FORCE_WEIGHTS_ONLY_LOAD` is set for the whole process before torch is used.

TorchScript keeps neither shapes nor output names: a session shows what the manifest
declares, inputs and outputs in the model's own order, and each answer is compared with it.
A run cannot be stopped. The CPU only.

The number of threads is torch's one global setting: the first session's count holds for
all of this process, and a session that asked for another says so in its findings.

Source: torch 2.13: `torch/_export/serde/serialize.py` (`deserialize_torch_artifact`),
`torch/export/pt2_archive/_package.py`, `torch/serialization.py`.
"""

import os
import threading
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import numpy as np

from platforms.artifact import ArtifactFormat, TensorSpec
from platforms.errors import InferenceError, ModelLoadError
from platforms.runtimes.base import (
    CPU_PROVIDER,
    DTYPES,
    Array,
    Declared,
    LoadOptions,
    RunStop,
    Runtime,
    Session,
    is_shape_allowed,
)

_SAFE_LOAD = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, OSError)
_FILE_ERRORS = (zipfile.BadZipFile, AssertionError, UnpicklingError)
_NATIVE_SUFFIXES = (".so", ".dll", ".dylib", ".cubin", ".o")

_load_lock = threading.Lock()
_threads_lock = threading.Lock()
_threads: list[int] = []
"""What this process told torch, once."""


class TorchSession(Session):
    """A module that is only read while it runs: one copy for all threads."""

    def __init__(
        self, library: Any, module: Any, declared: Declared, findings: tuple[str, ...]
    ) -> None:
        """Take over a loaded module and what is declared about it."""
        super().__init__(
            runtime=TorchRuntime.name,
            provider=CPU_PROVIDER,
            inputs=declared.inputs,
            outputs=declared.outputs,
            findings=findings,
        )
        self._library = library
        self._module = module

    def _run(self, inputs: Mapping[str, Array], stop: RunStop | None) -> dict[str, Array]:
        module, library = self._module, self._library
        if module is None:
            msg = "the session is closed"
            raise InferenceError(msg)
        try:
            with library.inference_mode():
                # A copy where NumPy's memory is not writable or not contiguous: torch warns of
                # the one and refuses the other's negative strides.
                values = [_to_tensor(library, inputs[spec.name]) for spec in self.inputs]
                found = module(*values)
                answers = _flatten(library, found)
        except _ERRORS as exc:
            msg = f"torch failed: {exc}"
            raise InferenceError(msg) from exc
        return _match_outputs(answers, self.outputs)

    def close(self) -> None:
        """Let go of the model; its memory returns when running inferences end."""
        self._module = None


class TorchRuntime(Runtime):
    """PyTorch, for TorchScript and `.pt2` files."""

    name: ClassVar[str] = "torchscript"
    extra: ClassVar[str] = "torch"
    formats: ClassVar[frozenset[ArtifactFormat]] = frozenset(
        {ArtifactFormat.TORCHSCRIPT, ArtifactFormat.TORCH_EXPORT}
    )

    def version(self) -> str:
        """Return torch's version."""
        return str(self.import_library("torch").__version__)

    def providers(self) -> tuple[str, ...]:
        """Return the CPU, the only device this adapter uses."""
        self.import_library("torch")
        return (CPU_PROVIDER,)

    def _load(self, path: Path, options: LoadOptions) -> Session:
        return self._load_declared(path, options, None)

    def _load_declared(
        self, path: Path, options: LoadOptions, declared: Declared | None
    ) -> Session:
        library = self.import_library("torch")
        os.environ[_SAFE_LOAD] = "1"
        findings = _set_threads(library, options.threads)
        is_script = _inspect_archive(path)
        if declared is None and is_script:
            msg = (
                f"{path.name}: TorchScript does not describe its tensors: "
                "load it with the manifest's inputs and outputs"
            )
            raise ModelLoadError(msg)
        try:
            # Locked: the filters are the process's, another thread would restore its own.
            with _load_lock, warnings.catch_warnings():
                # torch.jit says that it is deprecated, to whoever loads a file as well.
                warnings.simplefilter("ignore", DeprecationWarning)
                if is_script:
                    module, described = _load_script(library, path), declared
                else:
                    module, described = _load_program(library, path, declared)
        except (*_ERRORS, *_FILE_ERRORS) as exc:
            msg = f"torch refuses {path.name}: {exc}"
            raise ModelLoadError(msg) from exc
        if described is None:
            msg = f"{path.name} takes or gives something other than tensors"
            raise ModelLoadError(msg)
        _verify_runs(library, module, described, path)
        return TorchSession(library, module, described, findings)


def _set_threads(library: Any, wanted: int) -> tuple[str, ...]:
    with _threads_lock:
        if not _threads:
            library.set_num_threads(wanted)
            _threads.append(wanted)
        if _threads[0] == wanted:
            return ()
        return (f"torch runs on {_threads[0]} threads, set once per process, not on {wanted}",)


def _inspect_archive(path: Path) -> bool:
    """Say whether a file is TorchScript (else it is a `.pt2`), unpickling nothing.

    Raises:
        ModelLoadError: it is neither, or it carries compiled code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as exc:
        msg = f"{path.name} is no TorchScript or .pt2 archive (pickles are never loaded): {exc}"
        raise ModelLoadError(msg) from exc
    if any(
        name.startswith("data/aotinductor/") or name.endswith(_NATIVE_SUFFIXES) for name in names
    ):
        msg = f"{path.name} carries compiled code, which is not run here: export the plain program"
        raise ModelLoadError(msg)
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        return True
    if "archive_format" in names and any(name.startswith("models/") for name in names):
        return False
    msg = (
        f"{path.name} is a pickled module or state dict, which would run code when it is opened: "
        "export it with torch.export.save, or torch.jit.save"
    )
    raise ModelLoadError(msg)


def _load_script(library: Any, path: Path) -> Any:
    module = library.jit.load(str(path), map_location="cpu").eval()
    try:
        return library.jit.freeze(module)
    except RuntimeError:
        # Already frozen, or with attributes that it changes: it runs as it is, a little slower.
        return module


def _load_program(
    library: Any, path: Path, declared: Declared | None
) -> tuple[Any, Declared | None]:
    # An open file, not a path: torch warns about any name that does not end in .pt2.
    with path.open("rb") as file:
        program = library.export.load(file)
    known = {str(kind): dtype for dtype in DTYPES.values() if (kind := _to_torch(library, dtype))}
    nodes = {node.name: node.meta.get("val") for node in program.graph.nodes}
    signature = program.graph_signature

    def describe(names: Any) -> tuple[TensorSpec, ...]:
        return tuple(_to_spec(str(name), nodes.get(name), known) for name in names)

    own = Declared(describe(signature.user_inputs), describe(signature.user_outputs))
    return program.module(), _reconcile(own, declared)


def _to_torch(library: Any, dtype: np.dtype[Any]) -> Any:
    return getattr(library, "bool" if dtype == np.bool_ else dtype.name, None)


def _to_spec(name: str, value: Any, known: Mapping[str, np.dtype[Any]]) -> TensorSpec:
    if value is None or str(getattr(value, "dtype", None)) not in known:
        msg = f"{name} is no tensor that can be passed to or from a model here"
        raise ModelLoadError(msg)
    dtype = known[str(value.dtype)]
    datatype = next(kind for kind, candidate in DTYPES.items() if candidate == dtype)
    return TensorSpec(name, datatype, tuple(a if isinstance(a, int) else -1 for a in value.shape))


def _reconcile(own: Declared, declared: Declared | None) -> Declared:
    """Return the program's own tensors, under the declared names where those fit by order.

    Raises:
        ModelLoadError: the declaration has another count, element type or rank.
    """
    if declared is None:
        return own
    for mine, theirs in ((own.inputs, declared.inputs), (own.outputs, declared.outputs)):
        fits = len(mine) == len(theirs) and all(
            a.datatype is b.datatype and len(a.shape) == len(b.shape)
            for a, b in zip(mine, theirs, strict=True)
        )
        if not fits:
            msg = f"the program has the tensors {mine}, the manifest says {theirs}"
            raise ModelLoadError(msg)

    def rename(mine: tuple[TensorSpec, ...], theirs: tuple[TensorSpec, ...]) -> Any:
        pairs = zip(mine, theirs, strict=True)
        return tuple(TensorSpec(b.name, a.datatype, a.shape) for a, b in pairs)

    return Declared(
        rename(own.inputs, declared.inputs),
        rename(own.outputs, declared.outputs),
    )


def _verify_runs(library: Any, module: Any, declared: Declared, path: Path) -> None:
    """Run zeros of the declared shapes once: the only way to see what TorchScript takes.

    Raises:
        ModelLoadError: the model fails on them, or answers otherwise than declared.
    """
    zeros = {
        spec.name: np.zeros([max(axis, 1) for axis in spec.shape], DTYPES[spec.datatype])
        for spec in declared.inputs
    }
    try:
        TorchSession(library, module, declared, ()).run(zeros)
    except InferenceError as exc:
        msg = f"{path.name} does not take or give what the manifest declares: {exc}"
        raise ModelLoadError(msg) from exc


def _to_tensor(library: Any, value: Array) -> Any:
    ready = np.ascontiguousarray(value)
    return library.from_numpy(ready if ready.flags.writeable else ready.copy())


def _flatten(library: Any, found: Any) -> list[Array]:
    if isinstance(found, library.Tensor):
        return [found.numpy()]
    parts = found.values() if isinstance(found, dict) else found
    return [part.numpy() for part in parts]


def _match_outputs(answers: list[Array], declared: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """Name the answers by the declaration.

    Raises:
        InferenceError: their count, an element type or a shape is not as declared.
    """
    if len(answers) != len(declared):
        msg = f"the model gave {len(answers)} tensors, its declaration says {len(declared)}"
        raise InferenceError(msg)
    for spec, value in zip(declared, answers, strict=True):
        if value.dtype != DTYPES[spec.datatype] or not is_shape_allowed(spec.shape, value.shape):
            msg = (
                f"{spec.name}: the model gave {value.dtype}{list(value.shape)}, "
                f"its declaration says {spec.datatype}{list(spec.shape)}"
            )
            raise InferenceError(msg)
    return {spec.name: value for spec, value in zip(declared, answers, strict=True)}
