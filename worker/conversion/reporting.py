"""The report of a conversion, from what the pipeline found.

Owns the mapping into `converters.evidence.report`'s words, and the look for the nodes that ruin a
refused ONNX artifact.
"""

import hashlib
import logging
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agent.manifest import compute_sha256
from converters.conversion import Conversion, Made, measure_size
from converters.evidence.budget import Budget
from converters.evidence.layers import find_worst_layers
from converters.evidence.proof import Outcome
from converters.evidence.report import (
    ArtifactRecord,
    ConversionReport,
    GoldenRecord,
    LayerRecord,
    ProofRecord,
    SourceRecord,
    Verdict,
)
from converters.task import ModelFile, ModelFormat
from platforms.artifact import Precision
from platforms.errors import MeasuringError
from worker.conversion.folder import Identity
from worker.conversion.preparation import Data

log = logging.getLogger(__name__)

_VERDICTS = {
    Outcome.OK: Verdict.PUBLISHED,
    Outcome.REFUSED: Verdict.REFUSED,
    Outcome.FAILED: Verdict.FAILED,
    Outcome.NOT_RUN: Verdict.NOT_PROVEN,
}


def build_report(
    identity: Identity,
    done: Conversion,
    data: Data,
    budget: Budget | None,
    boxes: tuple[str, ...],
) -> ConversionReport:
    """Return the report; looks at refused ONNX artifacts node by node, which takes seconds."""
    source = done.survey.source
    tools: dict[str, str] = {}
    for made in done.made:
        for step in made.steps:
            tools.update(step["facts"].get("tools") or {})
    return ConversionReport(
        schema="edgeward.conversion/v1",
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        edgeward=_find_version(),
        source=SourceRecord(
            name=identity.name,
            version=identity.version,
            format=source.format.value,
            file=source.path.name + (f":{source.name}" if source.name else ""),
            sha256=_hash(source.path),
            size_bytes=measure_size(source),
        ),
        golden=GoldenRecord(
            rows=done.golden.rows,
            origin=done.golden.origin,
            reference="the original itself",
        ),
        artifacts=tuple(_describe(made, done, data) for made in done.made),
        budget="" if budget is None else budget.to_text(),
        targets=boxes,
        tools=dict(sorted(tools.items())),
        warnings=_warn(data),
    )


def _describe(made: Made, done: Conversion, data: Data) -> ArtifactRecord:
    plain = _find_plain(made, done)
    facts = data.facts.get("calibration")
    is_calibrated = facts is not None and made.recipe != "" and "static" in made.recipe
    return ArtifactRecord(
        name=_name(made),
        format=made.build.format.value,
        precision=made.build.precision.value,
        verdict=_VERDICTS[made.outcome],
        reason="" if made.is_ok else made.reason,
        route=tuple(_word_step(step) for step in made.steps),
        recipe=made.recipe,
        boxes=made.build.boxes,
        baseline="" if plain is None or plain is made else _name(plain),
        budget=made.budget.to_text(),
        size_bytes=made.size_bytes or None,
        size_ratio=made.size_ratio,
        digests={} if made.file is None else _hash_parts(made.file),
        proofs=tuple(ProofRecord.from_proof(proof) for proof in made.proofs),
        layers=_find_layers(made, plain, done),
        calibration=dict(facts) if is_calibrated and facts is not None else {},
        warnings=_list_warnings(made),
        duration_s=round(sum(step["duration_s"] for step in made.steps), 2),
    )


def _name(made: Made) -> str:
    if made.file is not None:
        return made.file.path.name
    return f"{made.build.format.value} {made.build.precision.value}"


def _find_plain(made: Made, done: Conversion) -> Made | None:
    """Return the artifact of the same format that was not compressed."""
    return next(
        (
            one
            for one in done.made
            if one.build.format is made.build.format and one.build.precision is Precision.FP32
        ),
        None,
    )


def _word_step(step: dict[str, Any]) -> str:
    return f"{step['tool']}, {step['duration_s']:g} s, {step['peak_mb']:.0f} MB"


def _list_warnings(made: Made) -> tuple[str, ...]:
    notes = [note for step in made.steps for note in step["facts"].get("notes") or ()]
    if made.is_ok and made.reason:
        notes.append(f"not everywhere: {made.reason}")
    if made.why:
        notes.append(made.why)
    return tuple(dict.fromkeys(map(str, notes)))


def _find_layers(made: Made, plain: Made | None, done: Conversion) -> tuple[LayerRecord, ...]:
    if made.outcome is not Outcome.REFUSED or made.build.format is not ModelFormat.ONNX:
        return ()
    if plain is None or plain.file is None or made.file is None or plain is made:
        return ()
    try:
        found = find_worst_layers(plain.file.path, made.file.path, done.golden.inputs)
    except MeasuringError as exc:
        log.info("no errors by node for %s: %s", made.file.path.name, exc)
        return ()
    return tuple(map(LayerRecord.from_layer, found))


def _warn(data: Data) -> tuple[str, ...]:
    if data.facts.get("is_disjoint") is False:
        return ("there were too few samples to keep the golden rows apart from the calibration's",)
    return ()


def _hash(path: Path) -> str:
    """Return the sha256 of a file, or of all files of a folder with their names."""
    if path.is_file():
        return compute_sha256(path)
    digest = hashlib.sha256()
    for part in sorted(path.rglob("*")):
        if part.is_file():
            digest.update(f"{part.relative_to(path)}\0{compute_sha256(part)}\n".encode())
    return digest.hexdigest()


def _hash_parts(file: ModelFile) -> dict[str, str]:
    parts = [file.path]
    weights = file.path.with_suffix(".bin")
    if file.format is ModelFormat.OPENVINO and weights.is_file():
        parts.append(weights)
    return {part.name: _hash(part) for part in parts}


def _find_version() -> str:
    try:
        return version("edgeward")
    except PackageNotFoundError:
        return ""
