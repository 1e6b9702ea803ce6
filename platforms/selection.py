"""Artifact selection: which file of a model version runs on this box, and why.

Pure: artifacts and a `PlatformSpec` in, a verdict for every artifact out. An artifact
is ruled out by what it needs and the box lacks, and every such reason is kept, in words
for a person. Ranking the compatible ones is one function, `_rank`: what was measured here goes
first, and where nothing was, the publisher's order stands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from platforms.artifact import ArtifactFormat, ArtifactSpec
from platforms.errors import NoArtifactError
from platforms.spec import AcceleratorKind, PlatformSpec, RuntimeStatus

RuntimeFormats = Mapping[str, frozenset[ArtifactFormat]]
"""The formats each runtime adapter reads, by the adapter's name, preferred runtime first."""

_EXTRAS = {
    "ort": "onnx",
    "litert": "litert",
    "openvino": "openvino",
    "torchscript": "torch",
}
"""The extra of our distribution that installs each runtime of ours."""


class Verdict(StrEnum):
    """What selection decided about one artifact."""

    CHOSEN = "chosen"
    COMPATIBLE = "compatible"
    RULED_OUT = "ruled_out"


@dataclass(frozen=True)
class Candidate:
    """One artifact, the runtime that would run it, and the verdict with its reason."""

    artifact: ArtifactSpec
    runtime: str | None
    """None where no proven runtime reads the format."""
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Preference:
    """What a measurement on this box found to be best."""

    file: str
    runtime: str
    reason: str

    def is_other(self, than: "Preference") -> bool:
        """Say whether it is another artifact or runtime."""
        return (self.file, self.runtime) != (than.file, than.runtime)


@dataclass(frozen=True)
class Selection:
    """Verdicts for all artifacts of a model version, in the manifest's order."""

    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate | None:
        """Return the chosen candidate, or None where every one is ruled out."""
        return next((found for found in self.candidates if found.verdict is Verdict.CHOSEN), None)

    def get_chosen(self) -> Candidate:
        """Return the chosen candidate.

        Raises:
            NoArtifactError: every artifact is ruled out; the message holds all reasons.
        """
        if self.chosen is not None:
            return self.chosen
        reasons = "\n".join(f"- {found.artifact.file}: {found.reason}" for found in self.candidates)
        raise NoArtifactError(
            f"none of {len(self.candidates)} artifacts can run on this box:\n{reasons}"
            if self.candidates
            else "the model version has no artifacts: publish it with at least one"
        )


def select_artifact(
    artifacts: Sequence[ArtifactSpec],
    spec: PlatformSpec,
    runtime_formats: RuntimeFormats,
    preference: Preference | None = None,
) -> Selection:
    """Judge every artifact against the box and choose one of the compatible ones.

    Args:
        artifacts: of one model version, in the publisher's order.
        spec: the box.
        runtime_formats: what reads what.
        preference: chosen where it is compatible still.
    """
    judged = [_judge(artifact, spec, runtime_formats) for artifact in artifacts]
    if preference is not None:
        judged = [_prefer(found, spec, runtime_formats, preference) for found in judged]
    compatible = [found for found in judged if found.verdict is Verdict.COMPATIBLE]
    ranked = _rank(compatible, preference)
    verdicts = {id(original): ranking for original, ranking in ranked}
    return Selection(tuple(verdicts.get(id(found), found) for found in judged))


def list_pairs(
    artifacts: Sequence[ArtifactSpec], spec: PlatformSpec, runtime_formats: RuntimeFormats
) -> list[Candidate]:
    """Return every artifact with every proven runtime that reads it; what cannot run, once."""
    pairs: list[Candidate] = []
    for artifact in artifacts:
        found = [
            _judge(artifact, spec, {name: formats})
            for name, formats in runtime_formats.items()
            if artifact.format in formats
        ]
        fit = [one for one in found if one.verdict is Verdict.COMPATIBLE]
        pairs += fit or [_judge(artifact, spec, runtime_formats)]
    return pairs


def _prefer(
    found: Candidate, spec: PlatformSpec, formats: RuntimeFormats, preference: Preference
) -> Candidate:
    """Judge the preferred artifact by the preferred runtime alone, if it can run it."""
    if found.artifact.file != preference.file or preference.runtime not in formats:
        return found
    only = {preference.runtime: formats[preference.runtime]}
    again = _judge(found.artifact, spec, only)
    return again if again.verdict is Verdict.COMPATIBLE else found


def _rank(
    compatible: Sequence[Candidate], preference: Preference | None
) -> list[tuple[Candidate, Candidate]]:
    """Pair each compatible candidate with its verdict: the measured one, or the first one."""
    for found in compatible:
        if preference is not None and (found.artifact.file, found.runtime) == (
            preference.file,
            preference.runtime,
        ):
            other = f"runs here too; measured on this box, {found.artifact.file} is better"
            return [
                (one, replace(one, verdict=Verdict.CHOSEN, reason=preference.reason))
                if one is found
                else (one, replace(one, reason=other))
                for one in compatible
            ]
    ranked = []
    for position, found in enumerate(compatible):
        is_first = position == 0
        ranking = replace(
            found,
            verdict=Verdict.CHOSEN if is_first else Verdict.COMPATIBLE,
            reason="first compatible in the manifest's order; not measured on this box yet"
            if is_first
            else f"runs here too, but the manifest lists {compatible[0].artifact.file} before it",
        )
        ranked.append((found, ranking))
    return ranked


def _judge(artifact: ArtifactSpec, spec: PlatformSpec, formats: RuntimeFormats) -> Candidate:
    runtime, runtime_reason = _find_runtime(artifact, spec, formats)
    reasons = (
        runtime_reason,
        _check_arch(artifact, spec),
        _check_cpu_flags(artifact, spec),
        _check_accelerator(artifact, spec),
        _check_memory(artifact, spec),
    )
    against = "; ".join(reason for reason in reasons if reason)
    verdict = Verdict.RULED_OUT if against else Verdict.COMPATIBLE
    return Candidate(artifact, runtime, verdict, against)


def _find_runtime(
    artifact: ArtifactSpec, spec: PlatformSpec, formats: RuntimeFormats
) -> tuple[str | None, str]:
    """Return the first proven runtime that reads the format, or None and why there is none."""
    readers = [name for name, readable in formats.items() if artifact.format in readable]
    if not readers:
        return None, f"no runtime of this version reads {artifact.format}"
    for name in readers:
        found = spec.runtime(name)
        if found is not None and found.status is RuntimeStatus.PROVEN:
            return name, ""
    return None, "; ".join(_explain_runtime(name, spec) for name in readers)


def _explain_runtime(name: str, spec: PlatformSpec) -> str:
    found = spec.runtime(name)
    if found is None:
        return f"runtime {name} has not been tried on this box: run `edgeward doctor`"
    if found.status is RuntimeStatus.MISSING:
        extra = _EXTRAS.get(name)
        remedy = f"pip install 'edgeward[{extra}]'" if extra else found.detail
        return f"runtime {name} is missing: {remedy or 'install its package'}"
    return f"runtime {name} is {found.status}: {found.detail or 'run `edgeward doctor`'}"


def _check_arch(artifact: ArtifactSpec, spec: PlatformSpec) -> str:
    if not artifact.requires_arch or spec.arch in artifact.requires_arch:
        return ""
    return f"built for {' or '.join(artifact.requires_arch)}, and this box is {spec.arch}"


def _check_cpu_flags(artifact: ArtifactSpec, spec: PlatformSpec) -> str:
    missing = [flag for flag in artifact.requires_cpu_flags if flag not in spec.cpu_flags]
    if not missing:
        return ""
    return f"needs the CPU feature {', '.join(missing)}, which {spec.cpu_model} does not have"


def _check_accelerator(artifact: ArtifactSpec, spec: PlatformSpec) -> str:
    wanted = artifact.requires_accelerator
    if wanted is None:
        return ""
    if wanted not in {kind.value for kind in AcceleratorKind}:
        return f"needs the accelerator {wanted!r}, which this version of Edgeward does not know"
    kind = AcceleratorKind(wanted)
    if spec.has_accelerator(kind):
        return ""
    unusable = next((found for found in spec.accelerators if found.kind is kind), None)
    if unusable is None:
        return f"needs the accelerator {wanted}, and this box has none"
    return f"needs the accelerator {wanted}; {unusable.name} cannot be used: {unusable.detail}"


def _check_memory(artifact: ArtifactSpec, spec: PlatformSpec) -> str:
    size_mb = artifact.size_bytes // 10**6
    if artifact.min_memory_mb is not None and artifact.min_memory_mb > spec.memory_mb:
        return f"needs {artifact.min_memory_mb} MB of memory, and this box allows {spec.memory_mb}"
    if size_mb >= spec.memory_mb:
        return f"the file alone is {size_mb} MB, and this box allows {spec.memory_mb} of memory"
    return ""
