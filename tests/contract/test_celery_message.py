"""What the agent sends without Celery is what Celery sends, and what its workers take."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.worker.request import Request
from kombu import Connection, Consumer, Producer, Queue

from agent.jobs import Lane
from agent.tasks import INFER_TASK, celery_message, celery_settings, lane_queue

TASK_ID = "01JZ5W7Q2M4N8R0T3V6X9YBCDE"
PAYLOAD = '{"v":1,"text":"Grüße"}'
# For people and tools only: how a task is shown, and who sent it.
SHOWN_ONLY = {"argsrepr", "kwargsrepr", "origin"}


@pytest.fixture
def ran() -> list[str]:
    return []


@pytest.fixture
def app(ran: list[str]) -> Iterator[Celery]:
    """A Celery app with the product's settings and a task of the product's name."""
    app = Celery("contract", set_as_current=False)
    app.conf.update(celery_settings("memory://"))
    app.conf.broker_transport_options = {}

    def run(payload: str) -> None:
        ran.append(payload)

    app.task(run, name=INFER_TASK, ignore_result=True, shared=False)
    app.finalize()
    yield app
    app.close()


def send_and_receive(body: Any, headers: dict[str, Any]) -> Any:
    """Send a message as the agent does, on kombu's transport in memory, and return it."""
    received: list[Any] = []
    queue = Queue(lane_queue(Lane.INFERENCE), durable=True)
    with Connection("memory://") as connection:
        producer = Producer(connection.channel(), serializer="json")
        producer.publish(
            body,
            routing_key=queue.name,
            headers=headers,
            correlation_id=headers["id"],
            declare=[queue],
        )
        consumer = Consumer(
            connection,
            queues=[queue],
            on_message=received.append,
            accept=["json"],
        )
        with consumer:
            connection.drain_events(timeout=5)
    [message] = received
    return message


def make_request(app: Celery, message: Any) -> Request:
    return Request(message, app=app, task=app.tasks[INFER_TASK], decoded=False)


def build_both(app: Celery) -> tuple[Any, Any]:
    ours = celery_message(INFER_TASK, TASK_ID, PAYLOAD)
    theirs = app.amqp.as_task_v2(TASK_ID, INFER_TASK, args=[PAYLOAD], kwargs={}, ignore_result=True)
    return ours, theirs


def test_body_is_the_one_that_celery_builds(app: Celery) -> None:
    (body, _), theirs = build_both(app)
    assert json.loads(json.dumps(body)) == json.loads(json.dumps(theirs.body))


def test_headers_are_those_that_celery_builds(app: Celery) -> None:
    (_, headers), theirs = build_both(app)
    assert set(headers) <= set(theirs.headers)
    for name in headers.keys() - SHOWN_ONLY:
        ours, expected = headers[name], theirs.headers[name]
        assert json.dumps(ours) == json.dumps(expected), name


def test_headers_that_are_left_out_are_empty_in_celery_too(app: Celery) -> None:
    (_, headers), theirs = build_both(app)
    left_out = {name: theirs.headers[name] for name in theirs.headers.keys() - headers.keys()}
    assert [name for name, value in left_out.items() if value] == []


def test_correlation_id_is_the_tasks_as_in_celery(app: Celery) -> None:
    (body, headers), theirs = build_both(app)
    message = send_and_receive(body, headers)
    assert theirs.properties["correlation_id"] == message.properties["correlation_id"] == TASK_ID


def test_worker_reads_the_same_request_from_ours_and_from_celerys(app: Celery) -> None:
    (body, headers), theirs = build_both(app)
    ours = make_request(app, send_and_receive(body, headers))
    expected = make_request(app, send_and_receive(theirs.body, theirs.headers))
    for name in ("id", "name", "root_id", "parent_id", "eta", "expires", "time_limits"):
        assert getattr(ours, name) == getattr(expected, name), name
    for name in ("args", "kwargs", "retries", "ignore_result", "callbacks", "errbacks", "chord"):
        assert ours.request_dict.get(name) == expected.request_dict.get(name), name
    assert (ours.id, ours.name, ours.ignore_result) == (TASK_ID, INFER_TASK, True)


def test_worker_runs_the_task_with_its_payload(app: Celery, ran: list[str]) -> None:
    message = send_and_receive(*celery_message(INFER_TASK, TASK_ID, PAYLOAD))
    make_request(app, message).execute()
    assert ran == [PAYLOAD]
