"""Filling in what a `config.pbtxt` leaves out, and checking what it says against the graph.

Owns Triton's defaulting rules as its `/config` shows them, and the batch size of a model that
says none. What runs the model is told as it is, whatever the file says.

Invariant: a completed message names every tensor of the graph once, and nothing else.

Source: answers of Triton 2.51 (tests/data/triton_config), whose server had no onnxruntime; for
that, read but not run: onnxruntime_backend, `ModelState::AutoCompleteConfig` in
`src/onnxruntime.cc` at 02ffb9e. It leaves a file alone that names inputs and outputs; else a graph
whose tensors all have a free first axis gets the server's default batch size where the file says
none, and `dynamic_batching` where the size is over 1; a size on any other graph is an error. It
does not try whether rows are independent, as is done here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from platforms.artifact import ArtifactFormat, TensorSpec
from worker.engine.modelconfig.message import ConfigMessage, get_config_class
from worker.engine.modelconfig.serving import (
    ServingConfig,
    get_type_number,
    read_datatype,
    write_serving,
)
from worker.engine.modelconfig.text import ConfigText
from worker.errors import ModelConfigError

DEFAULT_MAX_ROWS = 32
"""Batch size of a model that may be stacked and says no other. Triton's is 4; here the measured
cost decides below this, and an MLP's cost per row still falls up to 32 (7.8×, x86-64, 2 cores)."""

_TRITON_WORDS: Mapping[ArtifactFormat, tuple[str, str]] = MappingProxyType(
    {
        ArtifactFormat.ONNX: ("onnxruntime_onnx", "onnxruntime"),
        ArtifactFormat.TORCHSCRIPT: ("pytorch_libtorch", "pytorch"),
        ArtifactFormat.TORCH_EXPORT: ("", "pytorch"),
        ArtifactFormat.SAVED_MODEL: ("tensorflow_savedmodel", "tensorflow"),
        ArtifactFormat.OPENVINO: ("", "openvino"),
        ArtifactFormat.TFLITE: ("", "tflite"),
        ArtifactFormat.COREML: ("", "coreml"),
    }
)
"""Platform and backend in Triton's words."""


@dataclass(frozen=True, slots=True)
class Graph:
    """What a loaded model version says of itself."""

    name: str
    format: ArtifactFormat
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    is_batchable: bool
    """Rows stacked on axis 0 come back one by one, as the session was seen to do."""


def get_platform(artifact_format: ArtifactFormat) -> str:
    """Return Triton's word for what runs an artifact, as a model's metadata shows it."""
    platform, backend = _TRITON_WORDS[artifact_format]
    return platform or backend


def complete(
    config: ConfigText | None,
    graph: Graph,
    serving: ServingConfig,
    *,
    has_gpu: bool = False,
    default_max_rows: int = DEFAULT_MAX_ROWS,
) -> ConfigMessage:
    """Return the whole configuration of a model version.

    Args:
        config: the version's `config.pbtxt`, if it has one.
        graph: what the model says of itself.
        serving: the effective settings, which the result shows.
        has_gpu: this box has a GPU that a runtime can use.
        default_max_rows: the batch size where neither file nor manifest says one.

    Raises:
        ModelConfigError: the file contradicts the graph, or protobuf is not installed.
    """
    message = get_config_class()()
    if config is not None:
        message.CopyFrom(config.message)
    message.name = graph.name
    message.platform, message.backend = _TRITON_WORDS[graph.format]
    rows = compute_max_rows(config, graph, serving, default_max_rows=default_max_rows)
    message.max_batch_size = rows
    for side, entries, specs in (
        ("input", message.input, graph.inputs),
        ("output", message.output, graph.outputs),
    ):
        _complete_tensors(side, entries, specs, is_batched=rows > 0)
    write_serving(message, serving)
    message.default_model_filename = graph.file
    apply_defaults(message, has_gpu=has_gpu)
    return message


def compute_max_rows(
    config: ConfigText | None,
    graph: Graph,
    serving: ServingConfig,
    *,
    default_max_rows: int = DEFAULT_MAX_ROWS,
) -> int:
    """Return the batch size that clients are told; 0 for a model without a batch axis.

    A size that somebody wrote down goes above what the engine saw; a graph without a free
    first axis goes above both.

    Raises:
        ModelConfigError: a size is written down, and the graph has no free first axis.
    """
    if serving.max_rows is None:
        is_whole = config is not None and _has_whole_shapes(config, graph)
        return default_max_rows if graph.is_batchable and not is_whole else 0
    if serving.max_rows > 0:
        fixed = [spec for spec in (*graph.inputs, *graph.outputs) if not spec.has_free_batch]
        if fixed:
            msg = (
                f"{graph.name}: max_batch_size is {serving.max_rows}, but {fixed[0].name!r} has "
                f"the shape {list(fixed[0].shape)}: only a free first axis can be a batch"
            )
            raise ModelConfigError(msg)
    return serving.max_rows


def _has_whole_shapes(config: ConfigText, graph: Graph) -> bool:
    """Say whether the file gives a tensor's shape with its first axis, so that none is a batch."""
    ranks = {spec.name: len(spec.shape) for spec in (*graph.inputs, *graph.outputs)}
    entries = (*config.message.input, *config.message.output)
    return any(entry.dims and len(entry.dims) == ranks.get(entry.name) for entry in entries)


def _complete_tensors(
    side: str, entries: Any, specs: tuple[TensorSpec, ...], *, is_batched: bool
) -> None:
    known = {spec.name: spec for spec in specs}
    names = [entry.name for entry in entries]
    wrong = [name for name in names if name not in known or names.count(name) > 1]
    if wrong:
        msg = f"config.pbtxt: {side} {wrong[0]!r} is not one of the model's: {', '.join(known)}"
        raise ModelConfigError(msg)
    for spec in specs:
        entry = next((entry for entry in entries if entry.name == spec.name), None)
        _complete_tensor(side, entry or entries.add(name=spec.name), spec, is_batched=is_batched)


def _complete_tensor(side: str, entry: Any, spec: TensorSpec, *, is_batched: bool) -> None:
    shape = spec.shape[1:] if is_batched else spec.shape
    if not entry.data_type:
        entry.data_type = get_type_number(spec.datatype)
    if not entry.dims:
        entry.dims[:] = shape
    datatype = read_datatype(entry.data_type)
    if datatype is not spec.datatype:
        msg = f"config.pbtxt: {side} {spec.name!r} is {datatype}, in the model {spec.datatype}"
        raise ModelConfigError(msg)
    # A free axis may be narrowed by the file; a fixed one is what it is.
    fits = len(entry.dims) == len(shape) and all(
        want in (-1, have) for want, have in zip(shape, entry.dims, strict=True)
    )
    if not fits:
        batch = " after the batch axis" if is_batched else ", and max_batch_size is 0"
        msg = (
            f"config.pbtxt: {side} {spec.name!r} has dims {list(entry.dims)}, "
            f"the model {list(shape)}{batch}"
        )
        raise ModelConfigError(msg)


def apply_defaults(message: ConfigMessage, *, has_gpu: bool = False) -> None:
    """Fill in what Triton fills in whatever the graph: five rules.

    Versions: the latest one. Instances: one group named as the model where there is none,
    `<model>_<index>` where one has no name; KIND_AUTO becomes what the box has. Pinned memory
    on. Preferred batch size: the largest, under `dynamic_batching`. No dynamic batching without
    a batch axis.
    """
    if message.version_policy.WhichOneof("policy_choice") is None:
        message.version_policy.latest.num_versions = 1
    if not message.instance_group:
        message.instance_group.add(name=message.name)
    for index, group in enumerate(message.instance_group):
        group.name = group.name or f"{message.name}_{index}"
        group.count = max(group.count, 1)
        if group.kind == group.Kind.Value("KIND_AUTO"):
            group.kind = group.Kind.Value("KIND_GPU" if has_gpu else "KIND_CPU")
    for name in ("input_pinned_memory", "output_pinned_memory"):
        if not message.optimization.HasField(name):
            getattr(message.optimization, name).enable = True
    message.optimization.SetInParent()
    if not message.max_batch_size:
        message.ClearField("dynamic_batching")
    elif message.HasField("dynamic_batching"):
        batching = message.dynamic_batching
        batching.preferred_batch_size[:] = batching.preferred_batch_size or [message.max_batch_size]
