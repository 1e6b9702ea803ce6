import json
from typing import Any

import pytest

from console.rollout.desired import (
    Desired,
    Expected,
    build_desired,
    build_entry,
    choose_base,
    encode_desired,
    find_active,
    find_watch_s,
    read_desired,
    read_report,
)

TRACKER = {"release": "1.0.0"}
BODY: dict[str, Any] = {
    "epoch": "E",
    "version": 7,
    "models": {"detector": {"release": "2.2.1", "policy": {"max_rss_mb": 400}}, "tracker": TRACKER},
    "later": {"kept": True},
}
BASE = Desired("E", 7, BODY)
WANTED = Expected("detector", "2.3.0", "E", 8)


def make_report(version: int = 8, epoch: str | None = "E", **entry: Any) -> dict[str, Any]:
    return {"epoch": epoch, "desired_version": version, "models": {"detector": entry}}


def test_only_the_one_model_and_the_version_change() -> None:
    entry = build_entry(BASE.find_entry("detector"), "2.3.0", {"duration_s": 600.0})
    after = build_desired(BASE, None, "detector", entry)
    assert after.body == {
        **BODY,
        "version": 8,
        "models": {
            "detector": {
                "release": "2.3.0",
                "policy": {"max_rss_mb": 400},
                "probation": {"duration_s": 600.0},
            },
            "tracker": TRACKER,
        },
    }
    assert read_desired(encode_desired(after).encode()) == after


def test_traffic_names_old_releases_and_goes() -> None:
    assert build_entry({"release": "1", "traffic": {"1": 100}}, "2", None) == {"release": "2"}


@pytest.mark.parametrize(
    ("base", "reported", "expected"),
    [
        (BASE, None, ("E", 8)),
        (BASE, make_report(12), ("E", 13)),
        (BASE, make_report(12, "F"), ("E", 8)),
        (None, make_report(12, "F"), ("F", 13)),
    ],
    ids=["next", "the device has a newer one", "of another epoch", "only the device knows"],
)
def test_version_is_above_every_one_of_the_epoch(
    base: Desired | None, reported: dict[str, Any] | None, expected: tuple[str, int]
) -> None:
    after = build_desired(base, reported, "detector", {"release": "2.3.0"})
    assert (after.epoch, after.version) == expected


def test_first_document_of_all_begins_an_epoch() -> None:
    one, two = (build_desired(None, None, "m", {"release": "1"}) for _ in range(2))
    assert one.version == two.version == 1
    assert one.epoch != two.epoch


def test_base_is_what_the_broker_has_unless_it_lost_ours() -> None:
    newer, other = Desired("E", 9, BODY), Desired("F", 1, BODY)
    assert choose_base(None, None) is None
    assert choose_base(BASE, None) is choose_base(None, BASE) is BASE
    assert choose_base(BASE, newer) is newer
    assert choose_base(newer, BASE) is newer
    assert choose_base(other, newer) is other


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"[]",
        b'{"v":1,"type":"job.submit","body":{"epoch":"E","version":1}}',
        b'{"v":2,"type":"desired","body":{"epoch":"E","version":1}}',
        b'{"v":1,"type":"desired","body":[]}',
        b'{"v":1,"type":"desired","body":{"epoch":"E","version":true}}',
        b'{"v":1,"type":"desired","body":{"epoch":"E","version":0}}',
        b'{"v":1,"type":"desired","body":{"version":1}}',
    ],
)
def test_what_is_no_desired_document_is_none(payload: bytes) -> None:
    assert read_desired(payload) is None


NEW, OLD = {"version": 4, "release": "2.3.0"}, {"version": 3, "release": "2.2.1"}
TRYING = {**NEW, "state": "probation"}
REPORTS: list[tuple[str, dict[str, Any], str | None]] = [
    ("it has it", make_report(status="in_sync", active=NEW), "success"),
    ("in a later version too", make_report(11, status="in_sync", active=NEW), "success"),
    ("before it took ours", make_report(7, status="in_sync", active=NEW), None),
    ("in another epoch", make_report(8, "F", status="in_sync", active=NEW), None),
    ("never took any", make_report(0, None, status="in_sync", active=NEW), None),
    ("not begun", make_report(status="in_sync", active=OLD), None),
    ("still a candidate", make_report(status="in_sync", active=NEW, candidate=TRYING), None),
    ("at work", make_report(status="applying", active=OLD, candidate=TRYING), "working"),
    ("waits for its window", make_report(status="deferred", active=OLD), "working"),
    ("failed", make_report(status="failed", active=OLD), "failure"),
    ("rolled back", make_report(status="rolled_back", active=OLD, candidate=None), "failure"),
    ("another one failed", make_report(status="failed", candidate=OLD), None),
    ("so did it", make_report(status="failed", active=OLD, last={"release": "2.3.0"}), "failure"),
    ("so did one before", make_report(status="failed", active=OLD, last={"release": "2"}), None),
    ("pinned", make_report(status="pinned_local", active=OLD), "pin"),
    ("a word of later", make_report(status="dreaming", active=OLD), None),
    ("nonsense", make_report(status=5, active="x", candidate=[], reason=3), None),
]


@pytest.mark.parametrize(
    ("report", "expected"), [item[1:] for item in REPORTS], ids=[item[0] for item in REPORTS]
)
def test_report_is_judged_by_what_was_asked(report: dict[str, Any], expected: str | None) -> None:
    verdict = read_report(report, WANTED)
    assert (verdict.news.value if verdict else None) == expected


def test_words_of_a_report_come_along() -> None:
    reason = {"code": "error_rate", "message": "7 of 100 failed"}
    verdict = read_report(make_report(status="rolled_back", reason=reason), WANTED)
    assert verdict is not None
    assert (verdict.detail, verdict.reason.code) == ("rolled_back", "error_rate")
    working = read_report(make_report(status="applying", candidate=TRYING), WANTED)
    assert working is not None
    assert working.detail == "probation"


def test_removal_is_done_when_the_model_is_gone() -> None:
    removed = Expected("detector", None, "E", 8)
    gone: dict[str, Any] = {"epoch": "E", "desired_version": 8, "models": {}}
    verdict = read_report(gone, removed)
    assert verdict is not None
    assert verdict.news.value == "success"
    assert read_report(make_report(status="applying", active=OLD), removed) is not None
    assert read_report(None, removed) is None


def test_active_release_of_whatever_a_device_reports() -> None:
    assert find_active(make_report(active=OLD), "detector") == "2.2.1"
    empty: list[dict[str, Any] | None] = [None, {}, {"models": []}, {"models": {"detector": None}}]
    for report in [*empty, make_report()]:
        assert find_active(report, "detector") is None


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (None, 600),
        ({"release": "1"}, 600),
        ({"probation": {"duration_s": 30}}, 30),
        ({"probation": {"duration_s": 30}, "rollout": {"shadow_s": 60.0}}, 90),
        ({"probation": {"duration_s": "x"}, "rollout": []}, 0),
    ],
)
def test_time_of_watching_is_the_entrys(entry: dict[str, Any] | None, expected: float) -> None:
    assert find_watch_s(entry) == expected


def test_envelope_is_the_one_of_all_messages() -> None:
    envelope = json.loads(encode_desired(BASE))
    assert envelope.keys() == {"v", "id", "type", "ts", "body"}
    assert (envelope["v"], envelope["type"], envelope["body"]) == (1, "desired", BODY)
