"""The topics of `edgeward/v1`, written out as in docs/protocol.md."""

import pytest

from agent.commands import new_id
from agent.topics import (
    DEVICE_PATTERN,
    JOB_ID_PATTERN,
    Address,
    CommandAddress,
    DocumentAddress,
    JobAddress,
    Topics,
)

TOPICS = Topics("box-1")
JOB_ID = "01JZ5W7Q2M4N8R0T3V6X9YBCDE"


def test_topics_are_those_of_the_protocol() -> None:
    assert TOPICS.submit(JOB_ID) == f"edgeward/v1/box-1/c2d/job/{JOB_ID}"
    assert TOPICS.cancel(JOB_ID) == f"edgeward/v1/box-1/c2d/job/{JOB_ID}/cancel"
    assert TOPICS.command("ping") == "edgeward/v1/box-1/c2d/cmd/ping"
    assert TOPICS.status == "edgeward/v1/box-1/d2c/status"
    assert TOPICS.info == "edgeward/v1/box-1/d2c/info"
    assert TOPICS.reported == "edgeward/v1/box-1/d2c/reported"
    assert TOPICS.heartbeat == "edgeward/v1/box-1/d2c/heartbeat"
    assert TOPICS.sync == "edgeward/v1/box-1/d2c/sync"
    assert TOPICS.state(JOB_ID) == f"edgeward/v1/box-1/d2c/job/{JOB_ID}"
    assert TOPICS.result(JOB_ID) == f"edgeward/v1/box-1/d2c/result/{JOB_ID}"
    assert TOPICS.event("id_conflict") == "edgeward/v1/box-1/d2c/event/id_conflict"
    assert TOPICS.reply_prefix == "edgeward/v1/box-1/d2c/reply/"


def test_device_reads_its_own_commands_and_the_broadcast_and_nothing_else() -> None:
    assert TOPICS.subscriptions == ("edgeward/v1/box-1/c2d/#", "edgeward/v1/_all/c2d/cmd/+")
    assert TOPICS.reports == "edgeward/v1/box-1/d2c/#"


@pytest.mark.parametrize(
    ("topic", "address"),
    [
        (f"edgeward/v1/box-1/c2d/job/{JOB_ID}", JobAddress(JOB_ID)),
        (f"edgeward/v1/box-1/c2d/job/{JOB_ID}/cancel", JobAddress(JOB_ID, cancel=True)),
        # Whether it is a job id is for intake to say, with an event.
        ("edgeward/v1/box-1/c2d/job/no-ulid", JobAddress("no-ulid")),
        ("edgeward/v1/box-1/c2d/cmd/ping", CommandAddress("ping")),
        ("edgeward/v1/_all/c2d/cmd/ping", CommandAddress("ping", broadcast=True)),
        ("edgeward/v1/box-1/c2d/desired", DocumentAddress("desired")),
        ("edgeward/v1/box-1/c2d/ack", DocumentAddress("ack")),
        ("edgeward/v1/box-1/c2d/sync", DocumentAddress("sync")),
    ],
)
def test_command_topic_names_its_address(topic: str, address: Address) -> None:
    assert TOPICS.find_address(topic) == address


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "edgeward/v1/box-1",
        "edgeward/v1/box-1/c2d/",
        "edgeward/v1/box-1/c2d/job",
        f"edgeward/v1/box-1/c2d/job/{JOB_ID}/stop",
        f"edgeward/v1/box-1/c2d/job/{JOB_ID}/cancel/now",
        "edgeward/v1/box-1/c2d/cmd",
        "edgeward/v1/box-1/c2d/cmd/",
        "edgeward/v1/box-1/c2d/cmd/a/b",
        "edgeward/v1/box-1/c2d/desired/x",
        "edgeward/v1/box-1/c2d/status",
        "edgeward/v1/box-1/d2c/status",
        f"edgeward/v1/box-2/c2d/job/{JOB_ID}",
        f"edgeward/v1/box-10/c2d/job/{JOB_ID}",
        f"edgeward/v2/box-1/c2d/job/{JOB_ID}",
        f"edgeward/v1/_all/c2d/job/{JOB_ID}",
        "edgeward/v1/_all/c2d/cmd/",
        "edgeward/v1/_all/c2d/desired",
    ],
)
def test_topic_that_is_no_command_to_this_device_names_nothing(topic: str) -> None:
    assert TOPICS.find_address(topic) is None


@pytest.mark.parametrize(
    ("topic", "kind"),
    [
        (TOPICS.status, ("status", "")),
        (TOPICS.state(JOB_ID), ("job", JOB_ID)),
        (TOPICS.event("bad_command"), ("event", "bad_command")),
        (TOPICS.reply_prefix + "a/b", ("reply", "a/b")),
        (TOPICS.submit(JOB_ID), None),
        (Topics("box-2").status, None),
    ],
)
def test_report_topic_names_its_kind(topic: str, kind: tuple[str, str] | None) -> None:
    assert TOPICS.report_kind(topic) == kind


@pytest.mark.parametrize("name", ["a", "box-1", "A.b_c-9", "x" * 64])
def test_device_name_is_one_level_of_a_topic(name: str) -> None:
    assert DEVICE_PATTERN.fullmatch(name)


@pytest.mark.parametrize("name", ["", "x" * 65, "a/b", "+", "#", "a b", "é", "a\n"])
def test_name_that_breaks_a_topic_is_no_device(name: str) -> None:
    assert not DEVICE_PATTERN.fullmatch(name)


def test_job_id_is_a_ulid() -> None:
    assert JOB_ID_PATTERN.fullmatch(JOB_ID)
    assert JOB_ID_PATTERN.fullmatch(new_id())
    assert JOB_ID_PATTERN.fullmatch("7" + "Z" * 25)


@pytest.mark.parametrize(
    "text",
    [
        "",
        JOB_ID[:-1],
        JOB_ID + "0",
        JOB_ID.lower(),
        "8" + JOB_ID[1:],
        *(JOB_ID[:-1] + letter for letter in "ILOU"),
        JOB_ID + "\n",
        "../" + JOB_ID[3:],
    ],
)
def test_other_text_is_no_job_id(text: str) -> None:
    assert not JOB_ID_PATTERN.fullmatch(text)
