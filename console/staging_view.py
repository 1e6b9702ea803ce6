"""A staging as a person reads it, and staging a version from the command line.

Owns the wording of a `ChoiceRecord`; the trials themselves are `worker.staging`'s.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from agent.choice import Agreement, ChoiceRecord, Trial
from agent.config import Settings
from console.output import Output, build_facts, build_table
from platforms.selection import Preference
from platforms.spec import PlatformSpec

if TYPE_CHECKING:
    from rich.console import RenderableType

_COLOURS = {
    "chosen": "green",
    "right": "cyan",
    "wrong": "red",
    "failed": "red",
    "refused": "yellow",
    "ruled_out": "yellow",
}


def find_record(settings: Settings, folder: Path) -> ChoiceRecord | None:
    """Return what was measured of the version in `folder`; None where nothing was."""
    from agent.choice import compute_digest, find_choice

    return find_choice(settings.choices_dir, compute_digest(folder))


def find_box_preference(settings: Settings, spec: PlatformSpec, folder: Path) -> Preference | None:
    """Return what a worker of this box prefers of a version, as measured."""
    from console.model_explanation import compute_box_sizes
    from worker.staging.preference import find_preference

    threads, _ = compute_box_sizes(settings, spec)
    return find_preference(settings.choices_dir, folder, spec, threads)


def stage_version(
    settings: Settings, spec: PlatformSpec, folder: Path, out: Output, *, is_fresh: bool
) -> ChoiceRecord:
    """Measure a version's candidates on this box and record the choice; shows how far it is.

    Raises:
        NotProvenError: none of them may serve here.
        ManifestError, DigestMismatchError: the version is damaged.
    """
    from console.model_explanation import compute_box_sizes
    from worker.staging.stage import Stager, StageRequest

    threads, _ = compute_box_sizes(settings, spec)
    stager = Stager(spec, threads, settings.choices_dir)
    with out.progress("trials") as progress:
        task = progress.add_task("staging", total=None) if progress is not None else None

        def report(done: int, total: int, what: str) -> None:
            if progress is not None and task is not None:
                progress.update(task, completed=done, total=total, description=what or None)

        return stager.stage(StageRequest(folder, is_fresh=is_fresh), report)


def render_record(record: ChoiceRecord) -> list["RenderableType"]:
    """Return facts and a table of a staging."""
    from rich.text import Text

    facts = [("Staged", f"{record.measured_at}, by {record.objective}"), ("Choice", record.reason)]
    if not record.has_golden:
        facts.append(("Golden set", "none: that it runs is known, not that it is right"))
    rows = [
        (
            trial.file,
            trial.runtime,
            Text(trial.verdict.replace("_", " "), style=_COLOURS[trial.verdict]),
            _word_ms(trial.points[0].p50_ms if trial.points else None),
            _word_ms(trial.p95_ms),
            f"{trial.rows_per_s:,.0f}" if trial.rows_per_s else "–",
            f"{trial.rss_mb:.0f}" if trial.rss_mb is not None else "–",
            f"{trial.load_ms:.0f}" if trial.load_ms is not None else "–",
            _word_agreement(trial.golden),
            trial.reason,
        )
        for trial in _list_trials(record)
    ]
    headers = (
        "File",
        "Runtime",
        "Verdict",
        "p50 ms",
        "p95 ms",
        "Rows/s",
        "MB",
        "Load ms",
        "Agrees",
        "Why",
    )
    return [build_facts(facts), build_table(headers, rows)]


def _list_trials(record: ChoiceRecord) -> list[Trial]:
    """Return the trials, the chosen one first, what was not tried last."""
    order = list(_COLOURS)
    return sorted(record.trials, key=lambda one: order.index(one.verdict))


def _word_ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _word_agreement(agreement: Agreement | None) -> str:
    if agreement is None:
        return "–"
    if agreement.top_1 is not None:
        return f"{agreement.top_1:.1%}"
    return "all" if agreement.sqnr_db is None else f"{agreement.sqnr_db:.0f} dB"
