"""The vocabulary of model files: formats, precisions, tensors.

Owns the description of one artifact as selection and the runtimes see it. The
manifest on disk (`agent.manifest`) builds these; nothing here touches a file.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

SAVED_MODEL_FILE = "saved_model.pb"
"""An artifact of the format SavedModel is named by this file of its folder."""
MLPACKAGE_FILE = "Manifest.json"
"""And one of Core ML that is a folder (`.mlpackage`) by this one."""


class ArtifactFormat(StrEnum):
    """Formats of a model file."""

    ONNX = "onnx"
    TFLITE = "tflite"
    OPENVINO = "openvino"
    TORCHSCRIPT = "torchscript"
    TORCH_EXPORT = "pt2"
    COREML = "coreml"
    SAVED_MODEL = "saved_model"
    V2 = "v2"


class Precision(StrEnum):
    """Numeric precision of a model's weights, or of weights and activations."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4_WEIGHTS = "int4_weights"


class Datatype(StrEnum):
    """Tensor element types, by their Open Inference Protocol names."""

    BOOL = "BOOL"
    UINT8 = "UINT8"
    UINT16 = "UINT16"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    INT8 = "INT8"
    INT16 = "INT16"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    BF16 = "BF16"
    FP32 = "FP32"
    FP64 = "FP64"
    BYTES = "BYTES"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: name, element type and shape with −1 for a free axis."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]

    @property
    def has_free_batch(self) -> bool:
        """Say whether axis 0 may have any length."""
        return bool(self.shape) and self.shape[0] == -1


@dataclass(frozen=True)
class ArtifactSpec:
    """One artifact as selection sees it."""

    file: str
    format: ArtifactFormat
    precision: Precision
    size_bytes: int
    sha256: str
    requires_arch: tuple[str, ...] = ()
    """`Arch` values it is limited to; empty for any."""
    requires_cpu_flags: tuple[str, ...] = ()
    requires_accelerator: str | None = None
    """An `AcceleratorKind` value it cannot run without."""
    min_memory_mb: int | None = None


def locate_model(path: Path) -> Path:
    """Return what a runtime opens of an artifact: its file, or the folder that it stands for."""
    is_folder = path.name == SAVED_MODEL_FILE or (
        path.name == MLPACKAGE_FILE and path.parent.suffix == ".mlpackage"
    )
    return path.parent if is_folder else path
