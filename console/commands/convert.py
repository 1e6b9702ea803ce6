"""`edgeward convert`: from a trained model to proven artifacts."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from console.exits import Exit
from console.invocation import Invocation, command, end_with
from console.output import build_facts, build_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from converters.evidence.budget import Budget
    from converters.evidence.proof import Proof
    from converters.task import ModelFormat
    from platforms.artifact import Precision
    from worker.conversion.making import Result

_FORMATS = {
    "onnx": "onnx",
    "litert": "tflite",
    "tflite": "tflite",
    "openvino": "openvino",
    "coreml": "coreml",
    "torchscript": "torchscript",
    "pt2": "pt2",
}
"""What a person calls a format."""
_PRECISIONS = {
    "fp16": "fp16",
    "int8": "int8",
    "int4-weights": "int4_weights",
    "int4_weights": "int4_weights",
}


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    command(app, "convert")(convert)


def convert(
    call: Invocation,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="ONNX, TFLite, .pt2 or TorchScript file, SavedModel folder, FILE.py:FUNCTION, or "
            "weights with --builder.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The version's folder.")
    ],
    to: Annotated[
        str, typer.Option(metavar="LIST", help="onnx, litert, openvino, coreml, torchscript, pt2.")
    ] = "",
    quantize: Annotated[
        str, typer.Option(metavar="LIST", help="int8, fp16, int4-weights, beside the plain ones.")
    ] = "",
    targets: Annotated[
        str,
        typer.Option(metavar="LIST", help="rpi5, jetson-orin, x86-avx2, x86-vnni, mac-m."),
    ] = "",
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Samples for INT8: pictures, .npz or .jsonl."),
    ] = None,
    golden: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Inputs to judge on; else some of the samples."),
    ] = None,
    budget: Annotated[
        str, typer.Option(metavar="LIST", help="agreement=0.99,sqnr=20dB,size=0.3,latency=1.")
    ] = "",
    builder: Annotated[
        str | None,
        typer.Option(metavar="FILE.py:FUNCTION", help="Builds the module for bare weights."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name; else its own.")] = None,
    version: Annotated[str | None, typer.Option(help="The release; else its own.")] = None,
    time_limit_s: Annotated[
        float, typer.Option("--time-limit", min=1, metavar="S", help="For each step.")
    ] = 1800.0,
    memory_limit_mb: Annotated[
        float, typer.Option("--memory-limit", min=100, metavar="MB", help="For each step.")
    ] = 8000.0,
) -> None:
    """Convert and compress a model, prove every artifact, and write a model version.

    Each step runs in a process of its own, on a copy. What is outside its budget is refused, with
    the figure: then the exit code is 5, and what is proven is in the folder all the same.
    """
    from converters.routes.hop import Limits
    from converters.routes.source import identify
    from platforms.runtimes.proof import prove_runtimes
    from platforms.spec import RuntimeStatus
    from worker.conversion.making import Wishes, make_version

    wishes = Wishes(
        identify(source, builder),
        _read_formats(to or ("" if targets else "onnx")),
        _read_precisions(quantize),
        _read_boxes(targets),
        calibration,
        golden,
        _read_budget(budget),
        name,
        version,
        Limits(time_limit_s, memory_limit_mb),
    )
    with call.out.spinner("looking for runtimes"):
        found = prove_runtimes()
    runtimes = [item.name for item in found if item.status is RuntimeStatus.PROVEN]
    with _follow(call) as advance:
        result = make_version(wishes, out, runtimes, advance)
    document = result.report.model_dump(mode="json")
    call.out.show(document, lambda: _render(result, out))
    end_with(Exit.NOT_AS_ASKED if result.refused else Exit.OK)


def _read_list(text: str, known: dict[str, str], option: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in words if word not in known]
    if unknown:
        msg = f"{', '.join(unknown)}: there are {', '.join(known)}"
        raise typer.BadParameter(msg, param_hint=option)
    return list(dict.fromkeys(known[word] for word in words))


def _read_formats(text: str) -> "tuple[ModelFormat, ...]":
    from converters.task import ModelFormat

    return tuple(ModelFormat(word) for word in _read_list(text, _FORMATS, "--to"))


def _read_precisions(text: str) -> "tuple[Precision, ...]":
    from platforms.artifact import Precision

    return tuple(Precision(word) for word in _read_list(text, _PRECISIONS, "--quantize"))


def _read_boxes(text: str) -> tuple[str, ...]:
    from converters.targets import TARGETS

    return tuple(_read_list(text, {name: name for name in TARGETS}, "--targets"))


def _read_budget(text: str) -> "Budget | None":
    from converters.evidence.budget import parse_budget

    return parse_budget(text) if text else None


@contextmanager
def _follow(call: Invocation) -> "Iterator[Callable[[float, str], None]]":
    """Show how far it is, where somebody watches."""
    with call.out.progress("%") as progress:
        task = progress.add_task("reading the model", total=100) if progress is not None else None

        def advance(share: float, doing: str) -> None:
            if progress is not None and task is not None:
                progress.update(task, completed=100 * share, description=doing or None)

        yield advance


def _render(result: "Result", out: Path) -> Any:
    from rich.console import Group

    from converters.evidence.report import PAGE_FILE

    done = result.conversion
    facts = [
        ("Model", f"{result.identity.name} {result.identity.version}"),
        ("Golden", f"{done.golden.rows} rows: {done.golden.origin}"),
        ("Result", result.report.headline),
        ("Report", str(out / PAGE_FILE)),
    ]
    rows = []
    for made in done.made:
        label = f"{made.build.format.value} {made.build.precision.value}"
        proofs: list[Proof | None] = [*made.proofs] or [None]
        for proof in proofs:
            rows.append(
                (
                    label,
                    made.recipe or "as converted",
                    proof.runtime if proof else "–",
                    proof.outcome.value if proof else made.outcome.value,
                    _format(proof.agreement if proof else None, "{:.3f}"),
                    _format(proof.sqnr_db if proof else None, "{:.1f} dB"),
                    _format(proof.latency_ratio.get(1) if proof else None, "{:.2f} ×"),
                    _format(made.size_ratio, "{:.2f} ×"),
                    (proof.reason if proof else made.reason) or "",
                )
            )
    headers = ("Artifact", "Recipe", "Runtime", "Verdict", "Agrees", "SQNR", "Time", "Size", "Why")
    return Group(build_facts(facts), "", build_table(headers, rows))


def _format(value: float | None, how: str) -> str:
    return "–" if value is None else how.format(value)
