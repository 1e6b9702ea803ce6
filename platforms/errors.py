"""Errors of the platform layer.

PlatformError
├── RuntimeMissingError    the runtime's package is not installed; names the extra
├── ModelLoadError         the runtime refused the model file
├── NoArtifactError        no artifact of a model version can run on this box
├── TensorError            tensors given to a model do not fit it
├── InferenceError         the runtime failed on inputs that fit
├── RunStoppedError        the run was stopped from outside
└── MeasuringError         a file could not be run to be measured
"""

from typing import ClassVar


class PlatformError(Exception):
    """Anything the platform layer reports to its callers."""

    code: ClassVar[str] = "platform_error"
    retryable: ClassVar[bool] = False


class RuntimeMissingError(PlatformError):
    """The package of an inference runtime is not installed, or does not run on this box."""

    code = "runtime_missing"


class ModelLoadError(PlatformError):
    """A runtime refused to load a model file."""

    code = "model_load_failed"


class NoArtifactError(PlatformError):
    """No artifact of a model version can run on this box."""

    code = "no_compatible_artifact"


class TensorError(PlatformError):
    """An input tensor has the wrong name, shape, dtype or content for the model."""

    code = "bad_tensor"


class InferenceError(PlatformError):
    """The runtime failed while it ran a model on inputs that fit it."""

    code = "inference_failed"


class RunStoppedError(PlatformError):
    """Another thread stopped the run: it was cancelled, or past its time."""

    code = "run_stopped"


class MeasuringError(PlatformError):
    """A model could not be run to be measured: it was refused, or its process died or hung.

    Args:
        message: for a person.
        cause_code: of the error that the child itself answered with; None: it died or hung.
    """

    code = "measuring_failed"

    def __init__(self, message: str, cause_code: str | None = None) -> None:
        super().__init__(message)
        self.cause_code = cause_code
