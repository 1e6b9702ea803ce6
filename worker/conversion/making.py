"""A conversion from end to end: from what a person asked for to a version's folder.

Owns what the command and the job share. Only artifacts with evidence go into the folder; where
there is none, only the report does.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent.manifest import Manifest, Requirements, Tolerance
from converters.conversion import Conversion, Made, Order
from converters.errors import OutputExistsError
from converters.evidence.budget import Budget
from converters.evidence.report import ConversionReport, write_report
from converters.pipeline import convert_model, plan_builds, survey_source
from converters.routes.hop import Limits
from converters.task import ModelFile, ModelFormat, Report
from platforms.artifact import ArtifactFormat, Precision
from worker.conversion.folder import Contents, Identity, MadeArtifact, write_folder
from worker.conversion.preparation import find_files, gather_data, read_identity
from worker.conversion.reporting import build_report

_SURVEY_SHARE = 0.1


@dataclass(frozen=True)
class Wishes:
    """What somebody asks for."""

    source: ModelFile
    formats: tuple[ModelFormat, ...]
    precisions: tuple[Precision, ...] = ()
    boxes: tuple[str, ...] = ()
    """Kinds of boxes, of `converters.targets`."""
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
    report: ConversionReport

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
        out: the folder; empty or not there. Only the report is in it where nothing is proven.
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
        wishes.boxes,
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
        told = build_report(identity, done, data, wishes.budget, wishes.boxes)
        written = write_report(told, Path(name))
        manifest = None
        if done.published:
            contents = _gather_contents(identity, done, {**files, **written})
            manifest = write_folder(contents, out)
        else:
            out.mkdir(exist_ok=True)
            for file, path in written.items():
                (out / file).write_bytes(path.read_bytes())
    return Result(identity, done, manifest, told)


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
