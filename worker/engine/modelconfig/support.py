"""What of Triton's configuration is not offered here, each refused by its name.

Owns the list. Nothing that changes a model's answers or its order of work is ignored in
silence; hints about memory and CUDA graphs, which change neither, are.

Source: Triton's model_configuration.md, 25.x.
"""

from collections.abc import Callable, Iterator
from types import MappingProxyType

from platforms.artifact import ArtifactFormat
from worker.engine.modelconfig.message import ConfigMessage
from worker.engine.modelconfig.text import ConfigText
from worker.errors import UnsupportedConfigError

BACKENDS = MappingProxyType(
    {
        "onnxruntime": ArtifactFormat.ONNX,
        "pytorch": ArtifactFormat.TORCHSCRIPT,
        "openvino": ArtifactFormat.OPENVINO,
        "tflite": ArtifactFormat.TFLITE,
        "armnn_tflite": ArtifactFormat.TFLITE,
        "litert": ArtifactFormat.TFLITE,
        "tensorflow": ArtifactFormat.SAVED_MODEL,
        "coreml": ArtifactFormat.COREML,
    }
)
"""Triton's backends, and two of ours, with the artifacts that they read."""

PLATFORMS = MappingProxyType(
    {
        "onnxruntime_onnx": "onnxruntime",
        "pytorch_libtorch": "pytorch",
        "tensorflow_savedmodel": "tensorflow",
    }
)
"""Triton's older word for the same, with the backend that it stands for."""


def verify_supported(config: ConfigText, *, has_gpu: bool = False) -> None:
    """Refuse a configuration that asks for something not offered here.

    Args:
        config: the file.
        has_gpu: this box has a GPU that a runtime can use.

    Raises:
        UnsupportedConfigError: names all that is asked for in vain.
    """
    found = [*_find_unsupported(config.message), *_find_backend(config.message)]
    found += _find_devices(config.message, has_gpu=has_gpu)
    if found:
        msg = f"{config.origin} asks for what Edgeward does not offer: {'; '.join(found)}"
        raise UnsupportedConfigError(msg)


_FEATURES: tuple[tuple[str, Callable[[ConfigMessage], bool]], ...] = (
    ("ensemble_scheduling", lambda config: config.HasField("ensemble_scheduling")),
    ("sequence_batching", lambda config: config.HasField("sequence_batching")),
    (
        "model_transaction_policy.decoupled",
        lambda config: bool(config.model_transaction_policy.decoupled),
    ),
    (
        "model_operations.op_library_filename (libraries of one's own)",
        lambda config: bool(config.model_operations.op_library_filename),
    ),
    ("model_repository_agents", lambda config: bool(config.model_repository_agents.agents)),
    ("batch_input", lambda config: bool(config.batch_input)),
    ("batch_output", lambda config: bool(config.batch_output)),
    ("cc_model_filenames", lambda config: bool(config.cc_model_filenames)),
    (
        "optimization.execution_accelerators (the runtime's providers are a setting of the box)",
        lambda config: config.optimization.HasField("execution_accelerators"),
    ),
)


def _find_unsupported(config: ConfigMessage) -> Iterator[str]:
    yield from (name for name, is_asked in _FEATURES if is_asked(config))
    for tensor in config.input:
        if tensor.allow_ragged_batch:
            yield f"input {tensor.name!r}: allow_ragged_batch"
        if tensor.optional:
            yield f"input {tensor.name!r}: optional"
    for tensor in (*config.input, *config.output):
        if tensor.is_shape_tensor:
            yield f"{tensor.name!r}: is_shape_tensor"
        if tensor.is_non_linear_format_io:
            yield f"{tensor.name!r}: is_non_linear_format_io"
        if tensor.HasField("reshape"):
            yield f"{tensor.name!r}: reshape"


def _find_backend(config: ConfigMessage) -> Iterator[str]:
    if config.platform and config.platform not in PLATFORMS:
        yield f"platform {config.platform!r} (there are {', '.join(PLATFORMS)})"
    if config.backend and config.backend not in BACKENDS:
        yield f"backend {config.backend!r} (there are {', '.join(BACKENDS)})"


def _find_devices(config: ConfigMessage, *, has_gpu: bool) -> Iterator[str]:
    for group in config.instance_group:
        kind = group.Kind.Name(group.kind)
        where = f"instance_group {group.name!r}" if group.name else "instance_group"
        if (kind == "KIND_GPU" or group.gpus) and not has_gpu:
            yield f"{where}: KIND_GPU, and this box has no GPU"
        if group.passive or group.secondary_devices or group.profile:
            yield f"{where}: passive, secondary_devices and profile"
        if group.HasField("rate_limiter"):
            yield f"{where}: rate_limiter"
