"""The reference interpreter behind `Runtime`, so that it is tried as every runtime is.

Owns the translation of errors. It is in no registry: nothing serves with it, only evidence asks
for it, by its path (`converters.evidence.venues`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from converters.errors import ConversionError, ToolMissingError
from converters.evidence.mil import MilProgram, load_program
from converters.evidence.venues import MIL_REFERENCE
from platforms.artifact import ArtifactFormat
from platforms.errors import InferenceError, ModelLoadError, RuntimeMissingError
from platforms.runtimes.base import Array, LoadOptions, RunStop, Runtime, Session

_PROVIDER = "torch"


class MilSession(Session):
    """One program; its runs share nothing that changes."""

    def __init__(self, program: MilProgram) -> None:
        super().__init__(MIL_REFERENCE, _PROVIDER, program.inputs, program.outputs)
        self._program: MilProgram | None = program

    def _run(self, inputs: Mapping[str, Array], stop: RunStop | None) -> dict[str, Array]:
        program = self._program
        if program is None:
            msg = "the session is closed"
            raise InferenceError(msg)
        try:
            return program.run(inputs)
        except ConversionError as exc:
            raise InferenceError(str(exc)) from exc

    def close(self) -> None:
        """Let go of the program."""
        self._program = None


class MilReference(Runtime):
    """A reading of Core ML's ML programs by torch; no Core ML."""

    name: ClassVar[str] = MIL_REFERENCE
    extra: ClassVar[str] = "convert"
    formats: ClassVar[frozenset[ArtifactFormat]] = frozenset({ArtifactFormat.COREML})

    def version(self) -> str:
        """Return torch's version, by which it computes."""
        return f"torch {self.import_library('torch').__version__}"

    def providers(self) -> tuple[str, ...]:
        """Return the one there is."""
        return (_PROVIDER,)

    def _load(self, path: Path, options: LoadOptions) -> Session:
        self.import_library("torch").set_num_threads(options.threads)
        try:
            return MilSession(load_program(path))
        except ToolMissingError as exc:
            raise RuntimeMissingError(str(exc)) from exc
        except ConversionError as exc:
            raise ModelLoadError(str(exc)) from exc
