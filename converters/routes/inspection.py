"""What a source is, asked in a child process: nothing of it is loaded here."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from converters.routes.hop import Limits, run_hop
from converters.routes.registry import ToolEntry
from converters.task import Facts, ModelFile, ModelFormat, Report

_MODULES: Mapping[ModelFormat, tuple[tuple[str, ...], str]] = {
    ModelFormat.ONNX: (("onnx",), "convert"),
    ModelFormat.TFLITE: (("ai_edge_litert",), "litert"),
    ModelFormat.SAVED_MODEL: (("openvino",), "openvino"),
    ModelFormat.OPENVINO: (("openvino",), "openvino"),
}
_TORCH = (("torch",), "torch")


def inspect_source(
    source: ModelFile,
    options: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    report: Report = lambda share, doing: None,
    is_canceled: Callable[[], bool] = lambda: False,
) -> Facts:
    """Return a source's tensors, parameters, operators, precision and MANIFEST.

    Blocks as `run_hop` does, and raises what it raises.

    Args:
        source: from `converters.routes.source.identify`.
        options: as `converters.routes.tools.torch_source` takes them.
        limits: on time and memory.
        report: called with the progress.
        is_canceled: asked about ten times a second.
    """
    modules, extra = _MODULES.get(source.format, _TORCH)
    tool = ToolEntry(
        name=f"inspect {source.format}",
        sources=(source.format,),
        target=source.format,
        entry="converters.routes.tools.inspection:inspect",
        modules=modules,
        extra=extra,
    )
    with tempfile.TemporaryDirectory(prefix="edgeward-inspect-") as folder:
        target = Path(folder) / "facts.json"
        return run_hop(tool, source, target, options, limits, report, is_canceled).facts
