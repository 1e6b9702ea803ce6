"""A conversion from end to end: from what a person asked for to a version's folder.

Owns what the command and the job share. Only artifacts with evidence go into the folder; where
there is none, only the report does.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agent.manifest import Manifest, Requirements, Tolerance
from converters.errors import OutputExistsError
from converters.evidence.budget import Budget
from converters.evidence.proof import Outcome
from converters.pipeline import (
    Conversion,
    Made,
    Order,
    convert_model,
    measure_size,
    plan_builds,
    survey_source,
)
from converters.routes.hop import Limits
from converters.task import ModelFile, ModelFormat, Report
from platforms.artifact import ArtifactFormat, Precision
from worker.conversion.folder import Contents, Identity, MadeArtifact, write_folder
from worker.conversion.preparation import Data, find_files, gather_data, read_identity

REPORT_SCHEMA = "edgeward.conversion/v1"
REPORT_JSON = "report.json"
_SURVEY_SHARE = 0.1


@dataclass(frozen=True)
class Wishes:
    """What somebody asks for."""

    source: ModelFile
    formats: tuple[ModelFormat, ...]
    precisions: tuple[Precision, ...] = ()
    calibration: Path | None = None
    golden: Path | None = None
    budget: Budget | None = None
    name: str | None = None
    version: str | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Result:
    """What came of it."""

    identity: Identity
    conversion: Conversion
    manifest: Manifest | None
    """None where nothing is within its budget."""
    document: dict[str, Any]
    """The report, JSON-ready."""

    @property
    def refused(self) -> list[Made]:
        """Return what was asked for and is not in the folder."""
        return [made for made in self.conversion.made if not made.is_ok]


def make_version(
    wishes: Wishes,
    out: Path,
    runtimes: Sequence[str],
    report: Report = lambda share, doing: None,
    is_canceled: Callable[[], bool] = lambda: False,
) -> Result:
    """Convert, prove and write the version's folder; blocks for minutes.

    Args:
        wishes: what is asked for.
        out: the folder; empty or not there. Only `report.json` is in it where nothing is proven.
        runtimes: names of those that work here.
        report: told of progress.
        is_canceled: asked about ten times a second.

    Raises:
        ConversionError: the source cannot be read or run, or the data does not fit.
        ManifestError: what the source says of itself does not fit.
        OutputExistsError: there is something in `out`.
    """
    if out.exists() and any(out.iterdir()):
        msg = f"{out} is not empty: name another folder"
        raise OutputExistsError(msg)
    report(0.0, "reading the model")
    survey = survey_source(wishes.source, None, wishes.limits, is_canceled=is_canceled)
    identity = read_identity(survey, wishes.name, wishes.version)
    files = find_files(survey)
    data = gather_data(survey, identity, wishes.calibration, wishes.golden)
    order = Order(
        plan_builds(wishes.formats, wishes.precisions),
        data.samples,
        data.golden_inputs,
        data.golden_origin,
        wishes.budget,
        tuple(runtimes),
        wishes.limits,
    )

    def advance(share: float, doing: str) -> None:
        report(_SURVEY_SHARE + (1 - _SURVEY_SHARE) * share, doing)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=out.parent) as name:
        done = convert_model(survey, order, Path(name), advance, is_canceled)
        document = build_document(wishes, identity, done, data)
        report_file = Path(name) / REPORT_JSON
        report_file.write_text(json.dumps(document, indent=1, default=str), encoding="utf-8")
        manifest = None
        if done.published:
            contents = _gather_contents(identity, done, {**files, REPORT_JSON: report_file})
            manifest = write_folder(contents, out)
        else:
            out.mkdir(exist_ok=True)
            (out / REPORT_JSON).write_bytes(report_file.read_bytes())
    return Result(identity, done, manifest, document)


def _gather_contents(identity: Identity, done: Conversion, files: dict[str, Path]) -> Contents:
    return Contents(
        identity=identity,
        inputs=done.survey.inputs,
        outputs=done.survey.outputs,
        artifacts=[_to_artifact(made) for made in _sort(done.published)],
        golden_inputs=done.golden.inputs,
        golden_outputs=done.golden.outputs,
        tolerance=Tolerance(min_agreement=0.99, min_sqnr_db=40.0),
        files=files,
    )


def _sort(published: list[Made]) -> list[Made]:
    """Return artifacts as a box takes them that has measured nothing: the surest one first."""
    order = {ModelFormat.ONNX: 0, ModelFormat.TFLITE: 1, ModelFormat.OPENVINO: 2}
    return sorted(
        published,
        key=lambda made: (
            made.build.precision is not Precision.FP32,
            order.get(made.build.format, 3),
        ),
    )


def _to_artifact(made: Made) -> MadeArtifact:
    assert made.file is not None
    budget = made.budget
    return MadeArtifact(
        path=made.file.path,
        format=ArtifactFormat(made.build.format.value),
        precision=made.build.precision,
        requires=Requirements.model_validate(made.build.requires),
        tolerance=Tolerance(
            min_agreement=budget.agreement,
            min_top_5=budget.top5,
            min_sqnr_db=budget.sqnr,
            max_abs=budget.max_abs,
        ),
    )


def build_document(
    wishes: Wishes, identity: Identity, done: Conversion, data: Data
) -> dict[str, Any]:
    """Return the report of a conversion, JSON-ready."""
    survey = done.survey
    counts = {outcome.value: 0 for outcome in Outcome}
    for made in done.made:
        counts[made.outcome.value] += 1
    return {
        "schema": REPORT_SCHEMA,
        "name": identity.name,
        "version": identity.version,
        "edgeward": _find_version(),
        "source": {
            "path": wishes.source.path.name,
            "format": wishes.source.format.value,
            "function": wishes.source.name,
            "size_bytes": measure_size(wishes.source),
            "parameters": survey.facts.get("parameters"),
            "operators": survey.facts.get("operators"),
            "notes": survey.facts.get("notes"),
        },
        "inputs": survey.facts["inputs"],
        "outputs": survey.facts["outputs"],
        "data": dict(data.facts),
        "golden": {"rows": done.golden.rows, "origin": done.golden.origin},
        "duration_s": round(done.duration_s, 1),
        "counts": counts,
        "artifacts": [made.to_json() for made in done.made],
    }


def _find_version() -> str:
    try:
        return version("edgeward")
    except PackageNotFoundError:
        return ""
