"""The report of a conversion: its verdicts, its sentence, and a page that is safe and whole."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from converters.errors import ReportError
from converters.evidence.layers import LayerError
from converters.evidence.page import render_page
from converters.evidence.plot import Mark, draw_plot
from converters.evidence.proof import Outcome, Proof
from converters.evidence.report import (
    ArtifactRecord,
    ConversionReport,
    GoldenRecord,
    LayerRecord,
    ProofRecord,
    SourceRecord,
    Verdict,
    judge_artifact,
    read_report,
    write_report,
)
from platforms.parity import Parity

EVIL = "<script>alert(1)</script>\"'&<img src=http://evil.example/x onerror=a>"
_VOID = {"meta", "br", "img"}


def make_parity(*, sqnr_db: float = 21.5, top_1: float = 0.995) -> Parity:
    return Parity(
        name="y",
        rows=200,
        is_identical=math.isinf(sqnr_db),
        sqnr_db=sqnr_db,
        max_abs=0.31,
        mean_abs=0.02,
        cosine=0.999,
        top_1=top_1,
        top_k=1.0,
        k=5,
    )


def make_proof(
    runtime: str = "ort",
    outcome: Outcome = Outcome.OK,
    *,
    reason: str = "",
    p50_ms: float = 2.0,
    parity: Parity | None = None,
) -> Proof:
    return Proof(
        runtime,
        outcome,
        reason,
        version="1.32.0",
        parities=(parity or make_parity(),),
        confident_agreement=1.0,
        confident_rows=120,
        p50_ms={1: p50_ms, 8: 8 * p50_ms},
        latency_ratio={1: 0.52, 8: 0.43},
        load_ms=35.0,
        rss_mb=64.0,
    )


def make_artifact(
    name: str, verdict: Verdict, *proofs: Proof, layers: tuple[LayerRecord, ...] = ()
) -> ArtifactRecord:
    return ArtifactRecord(
        name=name,
        format="onnx",
        precision="int8",
        verdict=verdict,
        reason="; ".join(proof.reason for proof in proofs),
        route=("torch.onnx.export", "onnx_static"),
        recipe="onnx_static",
        size_bytes=3_600_000,
        size_ratio=0.27,
        digests={name: "ab" * 32},
        proofs=tuple(ProofRecord.from_proof(proof) for proof in proofs),
        layers=layers,
        calibration={"samples": 64},
        warnings=("a no-op",),
    )


def make_report(*artifacts: ArtifactRecord) -> ConversionReport:
    return ConversionReport(
        made_at="2026-11-23T12:00:00Z",
        edgeward="0.1.0",
        source=SourceRecord(
            name="net", version="1", format="onnx", file="net.onnx", sha256="cd" * 32
        ),
        golden=GoldenRecord(rows=200, origin="digits", reference="torch"),
        artifacts=artifacts,
        box={"cpu": "a cpu"},
        tools={"torch": "2.13.0"},
    )


def test_one_runtime_within_the_budget_publishes_and_the_others_are_warned_of() -> None:
    bad = make_proof("tflite-runtime", Outcome.REFUSED, reason="y: agreement 0.1")
    assert judge_artifact([make_proof(), bad]) == (
        Verdict.PUBLISHED,
        "",
        ("not for tflite-runtime: see there",),
    )


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ((), Verdict.NOT_PROVEN),
        ((Outcome.NOT_RUN,), Verdict.NOT_PROVEN),
        ((Outcome.FAILED, Outcome.NOT_RUN), Verdict.FAILED),
        ((Outcome.FAILED, Outcome.REFUSED), Verdict.REFUSED),
        ((Outcome.FAILED, Outcome.REFUSED, Outcome.OK), Verdict.PUBLISHED),
    ],
)
def test_verdict_on_an_artifact_follows_from_its_proofs(
    outcomes: tuple[Outcome, ...], verdict: Verdict
) -> None:
    found, reason, _ = judge_artifact([make_proof("ort", one, reason="why") for one in outcomes])
    assert found is verdict
    assert bool(reason) == (verdict is not Verdict.PUBLISHED)


def test_headline_names_what_is_fastest_and_what_became_of_the_rest() -> None:
    report = make_report(
        make_artifact("slow.onnx", Verdict.PUBLISHED, make_proof(p50_ms=9.0)),
        make_artifact("fast.onnx", Verdict.PUBLISHED, make_proof("openvino", p50_ms=0.7)),
        make_artifact("bad.onnx", Verdict.REFUSED, make_proof(outcome=Outcome.REFUSED)),
        make_artifact("none.tflite", Verdict.FAILED),
    )
    assert report.headline == (
        "2 of 4 artifacts within budget, 1 refused, 1 failed. Fastest: fast.onnx on openvino, "
        "0.7 ms a row, 0.52 × the uncompressed latency, 0.27 × the size, agreement 0.995."
    )


def test_headline_of_a_conversion_without_a_result_says_so() -> None:
    refused = make_artifact("bad.onnx", Verdict.REFUSED, make_proof(outcome=Outcome.REFUSED))
    assert make_report().headline == "No artifact was asked for."
    assert make_report(refused).headline == (
        "Nothing to publish: none of 1 artifact is within its budget."
    )


def test_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    equal = make_parity(sqnr_db=math.inf, top_1=1.0)
    report = make_report(
        make_artifact("a.onnx", Verdict.PUBLISHED, make_proof(parity=equal)),
        make_artifact("b.onnx", Verdict.NOT_PROVEN, Proof("", Outcome.NOT_RUN, "nothing here")),
    )
    written = write_report(report, tmp_path)
    assert sorted(written) == ["report.html", "report.json"]
    assert read_report(written["report.json"]) == report
    document = json.loads(written["report.json"].read_text())
    assert document["schema"] == "edgeward.conversion/v1"
    # Infinity is no JSON.
    assert document["artifacts"][0]["proofs"][0]["sqnr_db"] is None
    assert document["artifacts"][0]["proofs"][0]["is_identical"] is True


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be read"):
        read_report(tmp_path / "report.json")
    (tmp_path / "report.json").write_text('{"schema": "edgeward.conversion/v2"}')
    with pytest.raises(ReportError, match="no conversion report: schema"):
        read_report(tmp_path / "report.json")


class _Page(HTMLParser):
    """Checks that tags are balanced, and collects what a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [
            str(value)
            for name, value in attrs
            if name in ("src", "href", "data", "action") or name.startswith("on")
        ]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(report: ConversionReport) -> _Page:
    page = _Page()
    page.feed(render_page(report))
    page.close()
    assert page.open == []
    return page


def make_evil_report() -> ConversionReport:
    layers = (
        LayerRecord.from_layer(LayerError(EVIL, EVIL, EVIL, 3.0, 0.5, 40.0)),
        LayerRecord.from_layer(LayerError("nan", "Conv", "t", None, None)),
    )
    proof = Proof(EVIL, Outcome.REFUSED, EVIL, EVIL, EVIL, (make_parity(),), p50_ms={1: 1.0})
    evil = make_artifact(EVIL, Verdict.REFUSED, proof, make_proof(), layers=layers)
    return make_report(
        evil.model_copy(
            update={
                "calibration": {EVIL: EVIL},
                "warnings": (EVIL,),
                "route": (EVIL,),
                "boxes": (EVIL,),
                "format": EVIL,
            }
        ),
        make_artifact("untimed", Verdict.FAILED, Proof("ort", Outcome.FAILED, "SIGSEGV")),
    ).model_copy(update={"warnings": (EVIL,), "budget": EVIL, "targets": (EVIL,)})


def test_page_is_whole_and_escapes_whatever_comes_from_outside() -> None:
    page = read_page(make_evil_report())
    assert {"script", "img", "link", "iframe"} & page.tags == set()
    assert page.references == []
    assert page.text.count(EVIL) >= 8


def test_page_needs_nothing_else_and_may_load_nothing() -> None:
    text = render_page(make_report(make_artifact("a.onnx", Verdict.PUBLISHED, make_proof())))
    for foreign in ("http://", "https://", "url(", "@import", "src=", "href="):
        assert foreign not in text
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_page_tells_where_a_refused_artifact_goes_wrong() -> None:
    layers = (
        LayerRecord.from_layer(LayerError("last", "Gemm", "y", 2.0, 5.0, 3.1)),
        LayerRecord.from_layer(LayerError("deep", "Conv", "t", 3.1, 4.2, 39.9)),
    )
    proof = make_proof(outcome=Outcome.REFUSED, reason="y: agreement 0.31, at least 0.99 asked")
    text = read_page(
        make_report(make_artifact("bad.onnx", Verdict.REFUSED, proof, layers=layers))
    ).text
    assert "Most is lost at deep (Conv): 39.9 dB before it, 3.1 dB after." in text
    assert "y: agreement 0.31, at least 0.99 asked" in text


def test_page_without_any_time_has_no_picture() -> None:
    proof = Proof("mil-reference", Outcome.OK, parities=(make_parity(),), label="no Core ML")
    page = read_page(make_report(make_artifact("a.mlpackage", Verdict.PUBLISHED, proof)))
    assert "svg" not in page.tags
    assert "no Core ML" in page.text


def test_circles_at_one_place_are_moved_apart_and_stay_in_the_picture() -> None:
    marks = [Mark(n, "x", 1.0, math.inf, 1000, 0, is_ok=True) for n in range(1, 13)]
    drawn = draw_plot([*marks, Mark(13, "y", 300.0, -5.0, 10, 1, is_ok=False)])
    parts = [part.split('"') for part in drawn.split("<circle ")[1:]]
    centres = [(float(part[1]), float(part[3])) for part in parts]
    assert len(set(centres)) == 13
    for index, one in enumerate(centres):
        assert 60 < one[0] < 900
        assert 50 < one[1] < 345
        for other in centres[index + 1 :]:
            assert math.dist(one, other) > 12
