"""Staging a version: every candidate tried, the best of the right ones chosen, all of it recorded.

    verify → try each artifact on each runtime → compare with the active version → choose → record

Owns the order, the reuse of what was measured before, and the policy's gates. Changes nothing in
the repository: a version that was staged is not active.

Invariants: the record is durable before anybody learns the choice; a trial of before counts only
where artifact, runtime, box, driver and power mode are the same; progress is told before each one.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from agent.choice import (
    ChoiceRecord,
    Trial,
    Verdict,
    choose_trial,
    compute_digest,
    find_choice,
    identify_trial,
    write_choice,
)
from agent.lifecycle import NOTICEABLE_MS, Policy
from agent.manifest import MANIFEST_FILE, Manifest, read_manifest, verify_files
from platforms.probe import probe_power_mode
from platforms.runtimes.registry import RUNTIME_FORMATS
from platforms.selection import Candidate, list_pairs
from platforms.selection import Verdict as Compatibility
from platforms.spec import PlatformSpec
from worker.errors import NotProvenError
from worker.staging.golden import GoldenSet, load_golden
from worker.staging.preference import find_preference
from worker.staging.trial import TrialLimits, Tried, compare_with_active, run_trial

log = logging.getLogger(__name__)

_ACTIVE = "the active version"
_ROOT = Path("/")


@dataclass(frozen=True)
class StageRequest:
    """What to stage, and by which rules."""

    folder: Path
    """Of the version."""
    policy: Policy = field(default_factory=Policy)
    active: Path | None = None
    """Folder of the active version, to compare with."""
    limits: TrialLimits = field(default_factory=TrialLimits)
    is_fresh: bool = False
    """Measure again what was measured before."""


Report = Callable[[int, int, str], None]
"""Trials done, trials in all, what comes next; may raise to end the staging (a cancel)."""


def _ignore(_done: int, _total: int, _next: str) -> None:
    return


class Stager:
    """Stages versions on this box.

    Args:
        spec: the box, its runtimes proven.
        threads: inside one operator, as the engine will use.
        choices: the folder of all records.
    """

    def __init__(self, spec: PlatformSpec, threads: int, choices: Path) -> None:
        self._spec = spec
        self._threads = threads
        self._choices = choices
        self._power_mode = probe_power_mode(_ROOT)

    def stage(self, request: StageRequest, report: Report = _ignore) -> ChoiceRecord:
        """Try a version and record the verdicts; blocks for seconds up to minutes.

        Raises:
            ManifestError, DigestMismatchError: the version is not what its manifest says.
            NotProvenError: no candidate may serve; the record says why, for each.
        """
        folder = request.folder
        manifest = read_manifest(folder)
        verify_files(manifest, folder)
        golden = load_golden(manifest, folder)
        preferred = find_preference(self._choices, folder, self._spec, self._threads)
        pairs = list_pairs(manifest.artifact_specs(), self._spec, RUNTIME_FORMATS)
        known = self._find_known(folder, is_fresh=request.is_fresh)
        baseline = self._try_active(request, golden, report, len(pairs))
        trials: list[Trial] = []
        for number, pair in enumerate(pairs):
            report(number, len(pairs), f"{pair.artifact.file} on {pair.runtime}")
            before = known.get(self._identify(pair))
            if before is not None and baseline is None:
                trials.append(before)
                continue

            def pause(number: int = number) -> None:
                report(number, len(pairs), "")

            tried = run_trial(
                pair,
                folder,
                manifest,
                golden,
                threads=self._threads,
                limits=request.limits,
                pause=pause,
            )
            trials.append(self._complete(pair, tried, baseline))
        record = self._decide(folder, manifest, trials, baseline, request.policy)
        write_choice(self._choices, record)
        now = find_preference(self._choices, folder, self._spec, self._threads)
        if now is not None and (preferred is None or now.is_other(preferred)):
            # Whoever has it loaded takes it for a new one, and so loads what is best now.
            os.utime(folder / MANIFEST_FILE)
        report(len(pairs), len(pairs), "")
        if record.chosen is None:
            raise NotProvenError(record)
        return record

    def _find_known(self, folder: Path, *, is_fresh: bool) -> dict[str, Trial]:
        record = None if is_fresh else find_choice(self._choices, compute_digest(folder))
        if record is None:
            return {}
        decided = (Verdict.CHOSEN, Verdict.RIGHT)
        # What failed may have been the box's fault that day: it is tried again.
        return {
            one.identity: one.model_copy(update={"verdict": Verdict.RIGHT})
            for one in record.trials
            if one.verdict in decided and one.identity
        }

    def _identify(self, pair: Candidate) -> str:
        if pair.runtime is None:
            return ""
        return identify_trial(
            pair.artifact.sha256, pair.runtime, self._spec, self._threads, self._power_mode
        )

    def _try_active(
        self, request: StageRequest, golden: GoldenSet, report: Report, total: int
    ) -> Tried | None:
        """Measure what serves now, in the same minutes and on the same inputs."""
        if request.active is None or request.active.resolve() == request.folder.resolve():
            return None
        manifest = read_manifest(request.active)
        names = {entry.name for entry in manifest.inputs}
        pair = self._find_active_pair(request.active, manifest)
        if pair is None or names != set(golden.inputs):
            return None
        report(0, total, _ACTIVE)
        tried = run_trial(
            pair,
            request.active,
            manifest,
            GoldenSet(golden.inputs, None, golden.rows),
            threads=self._threads,
            limits=request.limits,
            pause=lambda: report(0, total, ""),
        )
        return tried

    def _find_active_pair(self, folder: Path, manifest: Manifest) -> Candidate | None:
        pairs = [
            pair
            for pair in list_pairs(manifest.artifact_specs(), self._spec, RUNTIME_FORMATS)
            if pair.verdict is Compatibility.COMPATIBLE
        ]
        preferred = find_preference(self._choices, folder, self._spec, self._threads)
        for pair in pairs:
            if preferred and (pair.artifact.file, pair.runtime) == (
                preferred.file,
                preferred.runtime,
            ):
                return pair
        return pairs[0] if pairs else None

    def _complete(self, pair: Candidate, tried: Tried, baseline: Tried | None) -> Trial:
        agreement = compare_with_active(tried, baseline.outputs if baseline else None)
        changes = {"identity": self._identify(pair), "active": agreement}
        return tried.trial.model_copy(update=changes)

    def _decide(
        self,
        folder: Path,
        manifest: Manifest,
        trials: Sequence[Trial],
        baseline: Tried | None,
        policy: Policy,
    ) -> ChoiceRecord:
        objective = policy.objective or manifest.objective
        base = baseline.trial if baseline is not None else None
        gated = [_gate(one, base, policy, has_golden=manifest.golden is not None) for one in trials]
        index, reason = choose_trial(gated, objective)
        if index is not None:
            gated[index] = gated[index].model_copy(update={"verdict": Verdict.CHOSEN})
        return ChoiceRecord(
            name=manifest.name,
            release=manifest.version,
            digest=compute_digest(folder),
            objective=objective,
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
            has_golden=manifest.golden is not None,
            threads=self._threads,
            trials=tuple(gated),
            reason=reason,
            baseline=base,
        )


def _gate(trial: Trial, base: Trial | None, policy: Policy, *, has_golden: bool) -> Trial:
    """Refuse a right trial that the policy does not allow."""
    if trial.verdict is not Verdict.RIGHT:
        return trial
    for why in _list_objections(trial, base, policy, has_golden=has_golden):
        return trial.model_copy(update={"verdict": Verdict.REFUSED, "reason": why})
    return trial


def _list_objections(
    trial: Trial, base: Trial | None, policy: Policy, *, has_golden: bool
) -> list[str]:
    found: list[str] = []
    if policy.require_golden and not has_golden:
        found.append("it brings no golden set, and the policy asks for one")
    rss_mb, p95_ms = trial.rss_mb or 0.0, trial.p95_ms or 0.0
    if policy.max_rss_mb is not None and rss_mb > policy.max_rss_mb:
        found.append(f"takes {rss_mb:.0f} MB, at most {policy.max_rss_mb:g} allowed")
    if policy.max_p95_ms is not None and p95_ms > policy.max_p95_ms:
        found.append(f"p95 {p95_ms:.3g} ms, at most {policy.max_p95_ms:g} allowed")
    if base is not None and base.p95_ms and _is_slower(p95_ms, base.p95_ms, policy.max_slowdown):
        ratio = p95_ms / base.p95_ms
        found.append(
            f"p95 {p95_ms:.3g} ms is {ratio:.1f} × the active version's; "
            f"at most {policy.max_slowdown:g} × allowed"
        )
    found += _list_disagreements(trial, policy)
    return found


def _is_slower(mine_ms: float, theirs_ms: float, allowed: float) -> bool:
    return mine_ms > allowed * theirs_ms and mine_ms - theirs_ms >= NOTICEABLE_MS


def _list_disagreements(trial: Trial, policy: Policy) -> list[str]:
    if policy.min_agreement is None or trial.active is None:
        return []
    agreement = trial.active.top_1
    if agreement is None or agreement >= policy.min_agreement:
        return []
    return [
        f"agrees with the active version in {agreement:.1%} of the rows; "
        f"{policy.min_agreement:.1%} asked"
    ]
