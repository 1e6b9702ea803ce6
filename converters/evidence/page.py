"""The report of a conversion as one page, for a person: `report.html`.

Owns its words and their order. One file that needs nothing else, no network and no script; all that
comes from models, tools and people is escaped, and the page's own policy lets nothing be loaded.
"""

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template

from converters.evidence.plot import Mark, draw_plot
from converters.evidence.proof import Outcome
from converters.evidence.report import (
    ArtifactRecord,
    ConversionReport,
    LayerRecord,
    ProofRecord,
    Verdict,
)

_TEMPLATE = Path(__file__).parent / "data" / "report.html"
_KINDS = ("onnx", "tflite", "openvino", "coreml", "torchscript", "pt2")
"""Formats in the order of their colours; any other has the last."""
_COLUMNS = (
    "agreement",
    "confident",
    "SQNR",
    "max off",
    "p50, 1 row",
    "8 rows",
    "load",
    "memory",
)
_SPAN = len(_COLUMNS) + 3
_KB, _MB = 10**3, 10**6
_TAGS = {
    Verdict.PUBLISHED: ("published", "ok"),
    Verdict.REFUSED: ("refused", "refused"),
    Verdict.FAILED: ("failed", "failed"),
    Verdict.NOT_PROVEN: ("not proven", "not_run"),
}
_BAR_FULL_DB = 60.0
"""A node of so much signal to noise, or more, has no bar."""


def render_page(report: ConversionReport) -> str:
    """Return the whole document."""
    name = f"{report.source.name} {report.source.version}".strip()
    template = Template(_TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{name}: conversion report"), body="\n".join(_iterate_body(report, name))
    )


def _iterate_body(report: ConversionReport, name: str) -> Iterator[str]:
    numbers = _number_proofs(report)
    yield f"<header><h1>{escape(name)}</h1>"
    yield f'<p class="under">Conversion report · {escape(_describe_when(report))}</p></header>'
    yield f'<p class="headline{_find_mood(report)}">{escape(report.headline)}</p>'
    yield from (f'<p class="note">⚠ {escape(text)}</p>' for text in report.warnings)
    yield from _draw_picture(report, numbers)
    yield from _write_table(report, numbers)
    yield from _write_troubles(report)
    yield from _write_origin(report)
    yield from _write_details(report)


def _describe_when(report: ConversionReport) -> str:
    parts = [report.made_at, f"Edgeward {report.edgeward}"]
    if report.box:
        parts.append(", ".join(report.box.values()))
    return " · ".join(parts)


def _find_mood(report: ConversionReport) -> str:
    if not report.count(Verdict.PUBLISHED):
        return " bad"
    return "" if report.count(Verdict.PUBLISHED) == len(report.artifacts) else " idle"


def _number_proofs(report: ConversionReport) -> dict[tuple[int, int], int]:
    """Return the number in table and picture, by positions of artifact and proof."""
    places = [
        (row, column)
        for row, artifact in enumerate(report.artifacts)
        for column, proof in enumerate(artifact.proofs)
        if proof.outputs
    ]
    return {place: number for number, place in enumerate(places, 1)}


def _get_kind(artifact: ArtifactRecord) -> int:
    return _KINDS.index(artifact.format) if artifact.format in _KINDS else len(_KINDS)


def _draw_picture(report: ConversionReport, numbers: dict[tuple[int, int], int]) -> Iterator[str]:
    marks = []
    for (row, column), number in numbers.items():
        artifact = report.artifacts[row]
        proof = artifact.proofs[column]
        latency_ms = proof.p50_ms.get(1)
        if latency_ms is None or latency_ms <= 0 or artifact.size_bytes is None:
            continue
        sqnr_db = math.inf if proof.is_identical else proof.sqnr_db
        marks.append(
            Mark(
                number=number,
                title=_describe_mark(artifact, proof),
                latency_ms=latency_ms,
                sqnr_db=-math.inf if sqnr_db is None else sqnr_db,
                size_bytes=artifact.size_bytes,
                kind=_get_kind(artifact),
                is_ok=proof.outcome is Outcome.OK,
            )
        )
    if not marks:
        return
    yield "<h2>Accuracy, speed and size</h2>"
    yield draw_plot(marks)
    yield f'<p class="note">{_write_key(report, marks)}</p>'


def _describe_mark(artifact: ArtifactRecord, proof: ProofRecord) -> str:
    return (
        f"{artifact.name} on {proof.runtime}: agreement {_write_share(proof.agreement)}, "
        f"{_write_level(proof)}, {_write_ms(proof.p50_ms.get(1))}, "
        f"{_write_size(artifact.size_bytes)}"
    )


def _write_key(report: ConversionReport, marks: Sequence[Mark]) -> str:
    used = {mark.kind for mark in marks}
    names = {_get_kind(item): item.format for item in report.artifacts if _get_kind(item) in used}
    parts = [
        f'<span class="key kind{kind}"><i></i><span>{escape(name)}</span></span>'
        for kind, name in sorted(names.items())
    ]
    if not all(mark.is_ok for mark in marks):
        parts.append('<span class="key"><i class="dash"></i><span>refused</span></span>')
    return "".join(parts) + "Numbers are those of the table; the area is the size of the file."


def _write_table(report: ConversionReport, numbers: dict[tuple[int, int], int]) -> Iterator[str]:
    yield "<h2>Artifacts</h2>"
    yield '<div class="scroll"><table><thead><tr><th class="l">#</th>'
    yield '<th class="l">artifact, runtime</th><th class="l">verdict</th>'
    yield "".join(f"<th>{escape(name)}</th>" for name in _COLUMNS) + "</tr></thead><tbody>"
    for row, artifact in enumerate(report.artifacts):
        yield _write_artifact(artifact)
        if artifact.reason and not artifact.proofs:
            yield _write_why(artifact.reason)
        for column, proof in enumerate(artifact.proofs):
            yield _write_proof(proof, numbers.get((row, column)), _get_kind(artifact))
            if proof.reason:
                yield _write_why(proof.reason, is_warning=proof.outcome is Outcome.NOT_RUN)
        yield from (_write_why(text, is_warning=True) for text in artifact.warnings)
    yield "</tbody></table></div>"


def _write_artifact(artifact: ArtifactRecord) -> str:
    text, style = _TAGS[artifact.verdict]
    facts = [artifact.format, artifact.precision]
    if artifact.recipe:
        facts.append(artifact.recipe)
    if artifact.size_bytes is not None:
        ratio = f" ({artifact.size_ratio:.2f} ×)" if artifact.size_ratio is not None else ""
        facts.append(f"{_write_size(artifact.size_bytes)}{ratio}")
    if artifact.boxes:
        facts.append(f"for {', '.join(artifact.boxes)}")
    return (
        f'<tr class="head"><td class="l" colspan="{_SPAN}">'
        f'<span class="name">{escape(artifact.name)}</span> '
        f'<span class="tag {style}">{text}</span> '
        f'<span class="dim">{escape(" · ".join(facts))}</span></td></tr>'
    )


def _write_proof(proof: ProofRecord, number: int | None, kind: int) -> str:
    # OpenVINO's has a build and a branch behind it.
    version = proof.version.partition("-")[0]
    name = " ".join(part for part in (proof.runtime or "–", version) if part)
    label = f" ({proof.label})" if proof.label else ""
    outcome = proof.outcome.value.replace("_", " ")
    confident = _write_share(proof.confident_agreement)
    if proof.confident_agreement is not None:
        confident += f' <span class="dim">of {proof.confident_rows}</span>'
    cells = (
        _write_share(proof.agreement),
        confident,
        _write_level(proof),
        _write_figure(_find_most([item.max_abs for item in proof.outputs])),
        _write_ratio(proof, 1),
        _write_ratio(proof, 8),
        _write_ms(proof.load_ms),
        f"{proof.rss_mb:,.0f} MB" if proof.rss_mb is not None else "–",
    )
    mark = f'<b class="kind{kind}">{number}</b>' if number else ""
    return (
        f'<tr><td class="l">{mark}</td><td class="l wrap">{escape(name)}'
        f'<span class="dim">{escape(label)}</span></td>'
        f'<td class="l"><span class="tag {proof.outcome.value}">{outcome}</span></td>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
    )


def _write_why(text: str, *, is_warning: bool = False) -> str:
    style = "why warn" if is_warning else "why"
    return f'<tr class="{style}"><td></td><td colspan="{_SPAN - 1}">{escape(text)}</td></tr>'


def _find_most(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _write_share(value: float | None) -> str:
    if value is None:
        return "–"
    text = f"{value:.3f}"
    # What is not all must not look like it.
    return f"{value:.6f}" if value < 1 and text == "1.000" else text


def _write_figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _write_level(proof: ProofRecord) -> str:
    if proof.is_identical:
        return "equal"
    return "–" if proof.sqnr_db is None else f"{proof.sqnr_db:.1f} dB"


def _write_ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _write_ratio(proof: ProofRecord, rows: int) -> str:
    text = _write_ms(proof.p50_ms.get(rows))
    ratio = proof.latency_ratio.get(rows)
    return text if ratio is None else f'{text} <span class="dim">{ratio:.2f} ×</span>'


def _write_size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "–"
    if size_bytes >= _MB:
        return f"{size_bytes / _MB:.1f} MB"
    return f"{size_bytes / _KB:.1f} kB"


def _write_troubles(report: ConversionReport) -> Iterator[str]:
    """Write where each refused artifact goes wrong, node by node."""
    with_layers = [item for item in report.artifacts if any(map(_is_off, item.layers))]
    if not with_layers:
        return
    yield "<h2>Where the refused ones go wrong</h2>"
    for artifact in with_layers:
        yield f'<section class="card"><h3>{escape(artifact.name)}</h3>'
        maker = max(artifact.layers, key=_find_loss)
        if _find_loss(maker) > 0:
            text = (
                f"Most is lost at {maker.node} ({maker.operator}): {maker.input_sqnr_db:.1f} dB "
                f"before it, {maker.sqnr_db:.1f} dB after. What follows passes it on."
            )
            yield f"<p>{escape(text)}</p>"
        yield '<div class="scroll"><table class="layers"><thead><tr><th class="l">node</th>'
        yield '<th class="l">operator</th><th>before</th><th>SQNR</th><th>max off</th>'
        yield '<th class="l">how bad</th></tr></thead><tbody>'
        yield from (_write_layer(layer) for layer in artifact.layers if _is_off(layer))
        yield "</tbody></table></div></section>"


def _is_off(layer: LayerRecord) -> bool:
    return layer.max_abs != 0


def _find_loss(layer: LayerRecord) -> float:
    if layer.input_sqnr_db is None or layer.sqnr_db is None:
        return 0.0
    return layer.input_sqnr_db - layer.sqnr_db


def _write_layer(layer: LayerRecord) -> str:
    def level(value: float | None) -> str:
        return "–" if value is None else f"{value:.1f} dB"

    if layer.sqnr_db is None:
        share = 0.0 if layer.max_abs == 0 else 1.0
    else:
        share = min(max(1 - layer.sqnr_db / _BAR_FULL_DB, 0.0), 1.0)
    return (
        f'<tr><td class="l">{escape(layer.node)}</td><td class="l">{escape(layer.operator)}</td>'
        f'<td class="dim">{level(layer.input_sqnr_db)}</td><td>{level(layer.sqnr_db)}</td>'
        f"<td>{_write_figure(layer.max_abs)}</td>"
        f'<td class="bar"><div style="width:{100 * share:.0f}%"></div></td></tr>'
    )


def _write_pairs(pairs: Sequence[tuple[str, str]]) -> str:
    known = [(name, text) for name, text in pairs if text]
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in known)
    return f"<dl>{rows}</dl>"


def _write_origin(report: ConversionReport) -> Iterator[str]:
    source, golden = report.source, report.golden
    size = f", {_write_size(source.size_bytes)}" if source.size_bytes is not None else ""
    yield "<h2>What was compared with what</h2>"
    yield _write_pairs(
        [
            ("source", f"{source.file} ({source.format}{size})"),
            ("sha256", source.sha256),
            ("golden inputs", f"{golden.rows:,} rows; {golden.origin}".rstrip("; ")),
            ("answers by", golden.reference),
            ("budget", report.budget or "the defaults by precision"),
            ("for", ", ".join(report.targets)),
            ("box", ", ".join(f"{name} {text}" for name, text in report.box.items())),
            ("tools", ", ".join(f"{name} {text}" for name, text in report.tools.items())),
        ]
    )


def _write_details(report: ConversionReport) -> Iterator[str]:
    yield "<h2>How each was made</h2>"
    for artifact in report.artifacts:
        facts = ", ".join(f"{name}: {text}" for name, text in artifact.calibration.items())
        took = f"{artifact.duration_s:.1f} s" if artifact.duration_s is not None else ""
        pairs = [
            ("route", " → ".join(artifact.route)),
            ("recipe", artifact.recipe),
            ("calibration", facts),
            ("budget", artifact.budget),
            ("compared with", artifact.baseline),
            ("took", took),
            *((f"sha256 of {name}", digest) for name, digest in artifact.digests.items()),
            ("reason", artifact.reason),
        ]
        yield f"<details><summary>{escape(artifact.name)}</summary>{_write_pairs(pairs)}</details>"
