"""What a conversion needs beside the model: who it is, and samples prepared as serving does it.

Owns the reading of a source's MANIFEST into the manifest's words, and the way from pictures to the
model's inputs by the very step that will serve them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agent.errors import ManifestError
from agent.manifest import NAME_PATTERN, SCHEMA, Manifest, Step
from converters.compression.calibration import (
    DEFAULT_GOLDEN_ROWS,
    DEFAULT_SAMPLES,
    CalibrationSet,
    Preprocess,
    load_calibration,
    make_golden,
)
from converters.errors import CalibrationError
from converters.pipeline import Survey
from converters.task import ModelFormat
from platforms.runtimes.base import Array
from worker.conversion.folder import Identity
from worker.errors import WorkerError
from worker.processing.registry import build_preprocessor
from worker.processing.step import JobInput

_FIRST_VERSION = "1.0.0"


@dataclass(frozen=True)
class Data:
    """What quantizers watch, and what artifacts are judged on."""

    samples: CalibrationSet | None
    golden_inputs: Mapping[str, Array] | None
    golden_origin: str
    facts: Mapping[str, Any]
    """For the report: where the data is from, how much of it, how it was chosen."""


def read_identity(survey: Survey, name: str | None = None, version: str | None = None) -> Identity:
    """Return who a source says it is; what is given goes before it.

    Raises:
        ManifestError: the MANIFEST beside the source does not fit.
    """
    said = survey.manifest
    try:
        return Identity(
            name=name or str(said.get("name") or _name_after(survey)),
            version=version or str(said.get("version") or _FIRST_VERSION),
            description=str(said.get("description", "")),
            license=str(said.get("license", "")),
            preprocess=Step.model_validate(said.get("preprocess") or {"name": "tensor"}),
            postprocess=tuple(map(Step.model_validate, said.get("postprocess") or ())),
            objective=str(said.get("objective", "latency_p95")),
        )
    except (ValidationError, TypeError) as exc:
        msg = f"the MANIFEST of {survey.source.path.name} does not fit: {exc}"
        raise ManifestError(msg) from exc


def _name_after(survey: Survey) -> str:
    source = survey.source
    words = source.name if source.format is ModelFormat.CALLABLE else source.path.stem
    kept = "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in words or "")
    return kept.strip("._-") or "model"


def find_files(survey: Survey) -> dict[str, Path]:
    """Return the further files that a source names (`files` of its MANIFEST), by their names.

    Raises:
        ManifestError: one is missing, or lies outside the source's folder.
    """
    source = survey.source
    home = (source.builder or source.path).resolve().parent
    found = {}
    for name in survey.manifest.get("files") or ():
        path = (home / str(name)).resolve()
        if not path.is_relative_to(home) or not path.is_file():
            msg = f"MANIFEST: {name!r} is no file beside {source.path.name}"
            raise ManifestError(msg)
        found[str(name)] = path
    return found


def build_preprocess(survey: Survey, identity: Identity) -> Preprocess:
    """Return the step that turns a picture's bytes into the model's inputs.

    Raises:
        ManifestError: what is said of the model makes no manifest.
        WorkerError: there is no such step, or its parameters do not fit.
    """
    source = survey.source
    step = build_preprocessor(
        _sketch_manifest(survey, identity), (source.builder or source.path).parent
    )

    def prepare(data: bytes) -> Mapping[str, Array]:
        try:
            return step(JobInput(data=data))
        except WorkerError as exc:
            raise CalibrationError(str(exc)) from exc

    return prepare


def _sketch_manifest(survey: Survey, identity: Identity) -> Manifest:
    """Return a manifest for the processing steps, which look at tensors and no artifact."""

    def sides(specs: Any) -> list[dict[str, Any]]:
        return [{"name": s.name, "datatype": s.datatype, "shape": s.shape} for s in specs]

    try:
        return Manifest.model_validate(
            {
                "schema": SCHEMA,
                "name": identity.name,
                "version": identity.version,
                "inputs": sides(survey.inputs),
                "outputs": sides(survey.outputs),
                "preprocess": identity.preprocess,
                "artifacts": [
                    {
                        "file": "to-be-made",
                        "format": "onnx",
                        "precision": "fp32",
                        "sha256": "0" * 64,
                        "size_bytes": 1,
                    }
                ],
            }
        )
    except ValidationError as exc:
        msg = f"what is said of the model makes no manifest (names: {NAME_PATTERN}): {exc}"
        raise ManifestError(msg) from exc


def gather_data(
    survey: Survey, identity: Identity, calibration: Path | None, golden: Path | None
) -> Data:
    """Read samples and golden inputs; where only samples are given, some are set apart.

    Args:
        survey: of the source.
        identity: of the version.
        calibration: pictures, `.npz` or JSON lines; None: no recipe gets any.
        golden: the same forms; None: some of the samples, else inputs are made up.

    Raises:
        CalibrationError: they do not fit the model, or are too few.
        ManifestError, WorkerError: the model's processing cannot be set up.
    """
    is_pictures = any(path is not None and path.is_dir() for path in (calibration, golden))
    preprocess = build_preprocess(survey, identity) if is_pictures else None
    samples: CalibrationSet | None = None
    facts: dict[str, Any] = {}
    apart: CalibrationSet | None = None
    if calibration is not None:
        wanted = DEFAULT_SAMPLES + (DEFAULT_GOLDEN_ROWS if golden is None else 0)
        found = load_calibration(calibration, survey.inputs, preprocess, wanted)
        samples = found
        if golden is None:
            split = make_golden(found)
            samples, apart = split.calibration, split.golden
            facts["is_disjoint"] = split.is_disjoint
        facts["calibration"] = dict(samples.facts)
    if golden is not None:
        apart = load_calibration(
            golden, survey.inputs, preprocess, DEFAULT_GOLDEN_ROWS * 4, min_samples=1
        )
    if apart is None:
        return Data(samples, None, "", facts)
    facts["golden"] = dict(apart.facts)
    origin = str(golden or calibration)
    return Data(samples, add_batch_axis(apart, survey), origin, facts)


def add_batch_axis(found: CalibrationSet, survey: Survey) -> dict[str, Array]:
    """Return samples as rows: axis 0 counts them, the input's other axes follow.

    Raises:
        CalibrationError: the model has an input without a batch axis.
    """
    whole = [name for name, is_whole in found.is_whole.items() if is_whole]
    if whole:
        msg = f"{', '.join(whole)} has no batch axis: give golden rows as an .npz of whole inputs"
        raise CalibrationError(msg)
    return {spec.name: found.inputs[spec.name] for spec in survey.inputs}
