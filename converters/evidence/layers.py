"""Where an ONNX candidate goes wrong: the error of each node's output against its original's.

Owns the matching of tensors between both files, and the measure. Both are run side by side on the
golden inputs with their inner tensors exposed, a group of tensors at a time, so that memory stays
that of a few tensors and not that of all. It runs in a process of its own; ONNX and its runtime
are loaded there only.

An inner tensor of the original is matched by its name, or, where the candidate rounds it, by the
name that onnxruntime's quantizer gives to the rounded form: only there is a ReLU applied that it
took into the rounding. A tensor that the candidate no longer has (a fused activation) is
left out. Errors add up along a graph: beside each stands that of the node's own inputs, which tells
where the loss is made and where it is only passed on.

    python -m converters.evidence.layers    # speaks as platforms.measuring.child

Source: the idea is that of onnxruntime 1.32's `onnxruntime/quantization/qdq_loss_debug.py`.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from converters.errors import ConversionError, SourceError

WORST = 10
_MAKERS = 3
"""So many nodes at which most is lost are told of as well."""
_ROWS = 16
"""Of the golden set: an error that ruins a model shows on any."""
_GROUP_BYTES = 256 * 10**6
"""Of inner tensors at a time, on either side."""
_MODULE = "converters.evidence.layers"
_ROUNDED = "_DequantizeLinear_Output"
"""What onnxruntime's quantizer appends to a tensor's name for its rounded form."""


@dataclass(frozen=True)
class LayerError:
    """How far one node's output is off, over all rows."""

    node: str
    operator: str
    tensor: str
    sqnr_db: float | None
    """None: equal, or no number."""
    max_abs: float | None
    input_sqnr_db: float | None = None
    """Lowest of those inner tensors that it reads; None: they are equal, or the model's inputs."""

    @property
    def lost_db(self) -> float:
        """Return by how much the node is worse than what it reads; 0 where that is not known."""
        if self.input_sqnr_db is None or self.sqnr_db is None:
            return 0.0
        return self.input_sqnr_db - self.sqnr_db

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)


def find_worst_layers(
    original: Path,
    candidate: Path,
    inputs: Mapping[str, Any],
    *,
    worst: int = WORST,
    time_limit_s: float = 600.0,
    memory_limit_mb: float | None = 8000.0,
) -> tuple[LayerError, ...]:
    """Return the nodes whose outputs are furthest off, the worst first; blocks for seconds.

    Those at which most is lost are among them, as the errors of what follows only pass it on.

    Args:
        original: the ONNX file of fp32.
        candidate: what was made of it, an ONNX file as well.
        inputs: golden inputs by name, axis 0 the rows; some of them are used.
        worst: how many.
        time_limit_s: for all of it.
        memory_limit_mb: of the process that does it.

    Raises:
        MeasuringError: a file cannot be run with its inner tensors exposed, or a limit was met.
    """
    from platforms.measuring.measurer import Measurer
    from platforms.measuring.sample import save_arrays

    with TemporaryDirectory(prefix="edgeward-layers-") as name:
        rows = Path(name) / "inputs.npz"
        save_arrays(rows, {key: array[:_ROWS] for key, array in inputs.items()})
        with Measurer(time_limit_s, memory_limit_mb, module=_MODULE) as child:
            answer = child.ask(
                {
                    "original": str(original),
                    "candidate": str(candidate),
                    "inputs": str(rows),
                    "worst": worst,
                }
            )
    return tuple(LayerError(**item) for item in answer["layers"])


class _Side:
    """One of the two files, its inner tensors exposed as asked."""

    def __init__(self, path: Path, inputs: Mapping[str, Any]) -> None:
        import onnx

        try:
            self.model = onnx.load(path)
        except (OSError, ValueError, onnx.onnx_cpp2py_export.checker.ValidationError) as exc:
            raise SourceError(f"{path.name} cannot be read as ONNX: {exc}") from exc
        except _get_decode_error() as exc:
            raise SourceError(f"{path.name} is no ONNX: {exc}") from exc
        self.name = path.name
        self._own = [item.name for item in self.model.graph.output]
        self._inputs = inputs

    @property
    def nodes(self) -> dict[str, Any]:
        """Return the node that makes each tensor, by the tensor's name."""
        return {name: node for node in self.model.graph.node for name in node.output if name}

    def estimate_bytes(self, rows: int) -> dict[str, int]:
        """Return the size of each inner tensor whose shape can be inferred."""
        import onnx

        known = onnx.shape_inference.infer_shapes(self.model).graph
        sizes = {}
        for info in (*known.value_info, *known.output):
            shape = info.type.tensor_type.shape.dim
            lengths = [axis.dim_value or rows for axis in shape]
            sizes[info.name] = 4 * math.prod(lengths)
        return sizes

    def run(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the values of inner tensors."""
        import onnx
        import onnxruntime

        outputs = self.model.graph.output
        del outputs[len(self._own) :]
        outputs.extend(onnx.ValueInfoProto(name=name) for name in names if name not in self._own)
        options = onnxruntime.SessionOptions()
        # As the file has it: a fused node would have no inner tensor to look at.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        try:
            session = onnxruntime.InferenceSession(
                self.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            feeds = {item.name: self._fit(item) for item in session.get_inputs()}
            return dict(zip(names, session.run(list(names), feeds), strict=True))
        except _get_faults() as exc:
            msg = f"{self.name} cannot be run with its inner tensors exposed: {exc}"
            raise SourceError(msg) from exc

    def _fit(self, item: Any) -> Any:
        """Return a golden input with the rows and the float type that this side takes."""
        import numpy as np

        array = self._inputs[item.name]
        first = item.shape[0] if item.shape else None
        if isinstance(first, int):
            array = array[np.arange(first) % len(array)]
        return array.astype(np.float16) if item.type == "tensor(float16)" else array


def _get_decode_error() -> type[Exception]:
    from google.protobuf.message import DecodeError

    return DecodeError


def _get_faults() -> tuple[type[Exception], ...]:
    """Return what onnxruntime raises; its classes share no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state

    kinds = vars(onnxruntime_pybind11_state).values()
    own = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception))
    return (*own, RuntimeError, ValueError, KeyError)


def _group(names: Sequence[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield tensors in groups of bounded size; one of unknown size takes a fourth of a group."""
    group: list[str] = []
    taken = 0
    for name in names:
        size = sizes.get(name, _GROUP_BYTES // 4)
        if group and taken + size > _GROUP_BYTES:
            yield group
            group, taken = [], 0
        group.append(name)
        taken += size
    if group:
        yield group


def _compare_files(original: Path, candidate: Path, inputs: Mapping[str, Any]) -> list[LayerError]:
    """Compare all tensors that both files have, in the original's order."""
    rows = len(next(iter(inputs.values())))
    left, right = _Side(original, inputs), _Side(candidate, inputs)
    nodes, there = left.nodes, right.nodes
    other = {
        name: name + _ROUNDED if name + _ROUNDED in there else name
        for name in nodes
        if name in there or name + _ROUNDED in there
    }
    found: dict[str, tuple[float, float]] = {}
    for group in _group([*other], left.estimate_bytes(rows)):
        mine, theirs = left.run(group), right.run([other[name] for name in group])
        for name in group:
            measured = _measure(mine[name], theirs[other[name]])
            if measured is not None:
                found[name] = measured
    return [
        _describe(nodes[name], name, figures, _find_before(name, nodes, found))
        for name, figures in found.items()
    ]


def _find_before(
    tensor: str, nodes: Mapping[str, Any], found: Mapping[str, tuple[float, float]]
) -> list[tuple[float, float]]:
    """Return the figures of what a tensor is made of: the nearest before it that have some."""
    levels: list[tuple[float, float]] = []
    seen: set[str] = set()
    waiting = [*nodes[tensor].input]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in nodes:
            continue
        seen.add(name)
        if name in found:
            levels.append(found[name])
        else:
            waiting += nodes[name].input
    return levels


def _measure(reference: Any, value: Any) -> tuple[float, float] | None:
    """Return SQNR and largest distance; None for what is no float or of another shape."""
    import numpy as np

    from platforms.parity import compute_sqnr_db

    is_float = reference.dtype.kind == "f" and value.dtype.kind == "f"
    if not is_float or reference.shape != value.shape or not reference.size:
        return None
    one, two = reference.astype(np.float64), value.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        return compute_sqnr_db(one, two), float(np.max(np.abs(one - two)))


def _describe(
    node: Any, tensor: str, figures: tuple[float, float], before: Sequence[tuple[float, float]]
) -> LayerError:
    levels = [level for level, _ in before if math.isfinite(level)]
    sqnr_db, max_abs = figures
    return LayerError(
        node=node.name or tensor,
        operator=node.op_type,
        tensor=tensor,
        sqnr_db=sqnr_db if math.isfinite(sqnr_db) else None,
        max_abs=max_abs if math.isfinite(max_abs) else None,
        input_sqnr_db=min(levels, default=None),
    )


def _rank(layer: LayerError) -> float:
    """Return what the worst are found by: no number is the worst, equal the best."""
    if layer.sqnr_db is not None:
        return layer.sqnr_db
    return math.inf if layer.max_abs == 0 else -math.inf


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from platforms.measuring.sample import load_arrays

    try:
        found = _compare_files(
            Path(request["original"]),
            Path(request["candidate"]),
            load_arrays(Path(request["inputs"])),
        )
    except ConversionError as exc:
        return {"error": {"code": exc.code, "message": str(exc)}}
    return {"layers": [layer.to_json() for layer in _choose(found, request["worst"])]}


def _choose(found: Sequence[LayerError], worst: int) -> list[LayerError]:
    """Return the worst, and with them those where most is lost, the worst first."""
    chosen = sorted(found, key=_rank)[:worst]
    makers = sorted(found, key=lambda layer: -layer.lost_db)[:_MAKERS]
    return sorted({*chosen, *(one for one in makers if one.lost_db > 0)}, key=_rank)


def main() -> int:
    """Compare as told."""
    from platforms.measuring.child import serve

    return serve(lambda answers: _answer)


if __name__ == "__main__":
    sys.exit(main())
