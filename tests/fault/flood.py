"""A flood of junk: what a console gone mad, or somebody with its password, may send.

As a module it prints figures: `python -m tests.fault.flood --messages 1000000`, and
`python -m tests.fault.flood --payloads 100000` for the parsers alone.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from agent.commands import (
    decode_envelope,
    encode_body,
    new_id,
    parse_ack,
    parse_submit,
    parse_sync,
)
from agent.daemon.mqtt import set_no_delay
from agent.errors import CommandError
from tests.harness.box import Box, RecordingConsole, make_body, make_envelope
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.waiting import wait_until

LIMIT_BYTES = 262_144
SEED = 3
_PART = 20_000
_IDS = [new_id() for _ in range(500)]
_BASE = "edgeward/v1/box-1/"
_TOPICS = (
    f"{_BASE}c2d/job/no-ulid",
    f"{_BASE}c2d/job/",
    f"{_BASE}c2d/job/x/cancel",
    f"{_BASE}c2d/cmd/ping",
    f"{_BASE}c2d/cmd/rm -rf",
    f"{_BASE}c2d/ack",
    f"{_BASE}c2d/sync",
    f"{_BASE}c2d/desired",
    f"{_BASE}c2d/a/b/c/d/e",
    f"{_BASE}c2d/\u202e💣",
    "edgeward/v1/_all/c2d/cmd/ping",
    "edgeward/v1/_all/c2d/cmd/doctor",
    # Where a device does not listen.
    "edgeward/v1/_all/c2d/job/x",
    "edgeward/v1/box-2/c2d/ack",
    "edgeward/v2/box-1/c2d/ack",
)
_PIECES = (
    b'{"v":1,',
    b'"id":"m",',
    b'"type":"job.submit",',
    b'"body":{',
    b'"seq":1e999',
    b'"missing":[[[[',
    b"\xff\xfe",
    b"\x00",
    b"}",
    b"]",
    b'"\\ud800"',
    b"NaN",
    b"-0",
    b'"acked_seq":99999999999999999999999',
    b"null",
    b"9" * 400,
    b"[" * 300,
    b'"cron":"* * * * *"',
)


def iter_payloads(count: int, seed: int = SEED) -> Iterator[bytes]:
    """Yield the same junk for the same seed: good envelopes bent, and bytes of no meaning."""
    source = random.Random(seed)
    missing = {"v": 1, "id": "m", "type": "job.submit", "body": make_body(job_id=_IDS[0])}
    window = {"cron": "0 3 * * *", "duration_s": 60, "idle": True, "max_temperature_c": 70}
    good = [
        make_envelope(make_body()),
        make_envelope(make_body(window=window, dedupe_key="k", on_full="fail", priority=9)),
        make_envelope({"seq": 12, "ledger": _IDS[0]}, "ack"),
        make_envelope({"acked_seq": 1, "missing": [missing], "unknown": _IDS[:3]}, "sync"),
        make_envelope({"cancel": _IDS[:2]}, "sync", not_after="2099-01-01T00:00:00Z"),
    ]
    for _ in range(count):
        yield _bend(source, bytearray(source.choice(good)))


def _bend(source: random.Random, payload: bytearray) -> bytes:
    kind = source.randrange(6)
    if kind == 0:
        return source.randbytes(source.randrange(200))
    if kind == 1:
        return b"".join(source.choices(_PIECES, k=source.randrange(1, 9)))
    for _ in range(source.randrange(1, 4)):
        at = source.randrange(len(payload))
        if kind == 2:
            payload[at] ^= 1 << source.randrange(8)
        elif kind == 3:
            payload[at : at + source.randrange(20)] = source.choice(_PIECES)
        elif kind == 4:
            del payload[at : at + source.randrange(1, 30)]
        else:
            payload[at:at] = payload[at : at + source.randrange(60)]
        if not payload:
            break
    return bytes(payload)


def read_all(payloads: Iterator[bytes]) -> int:
    """Do with payloads what intake does, however they are addressed; return how many were refused.

    Anything but a CommandError gets out.
    """
    refused = 0
    for payload in payloads:
        before = refused
        for parse in (parse_ack, parse_sync, lambda envelope: parse_submit(envelope, _IDS[0])):
            try:
                envelope = decode_envelope(payload, LIMIT_BYTES)
                encode_body(envelope.body)
                found = parse(envelope)
            except CommandError:
                refused = before + 1
                continue
            for document in getattr(found, "missing", ()):
                with suppress(CommandError):
                    encode_body(document)
    return refused


def flood(port: int, count: int, qos: int) -> None:
    """Publish junk on every topic that a device listens to, and on some that it does not."""
    source = random.Random(SEED + qos)
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
    client.on_socket_open = set_no_delay
    client.max_inflight_messages_set(200)
    client.connect("127.0.0.1", port)
    client.loop_start()
    for number, payload in enumerate(iter_payloads(count, SEED + qos)):
        topic = source.choice((*_TOPICS, f"{_BASE}c2d/job/{source.choice(_IDS)}"))
        # Now and then one over the limit for payloads.
        junk = payload if number % 5000 else payload + b"x" * 300_000
        info = client.publish(topic, junk, qos=qos)
        # paho keeps what it cannot send yet in memory: without a pause, all of it.
        if number % 500 == 499:
            info.wait_for_publish(60)
    client.disconnect()
    client.loop_stop()


@dataclass(frozen=True)
class Figures:
    """What a flood did to the agent."""

    before_mb: float
    highest_mb: float
    after_mb: float
    took_s: float


def measure_flood(box: Box, console: RecordingConsole, messages: int) -> Figures:
    """Flood a running agent and wait until it answers again.

    Raises:
        AssertionError: it ended, or answers no more.
    """
    process = psutil.Process(box.processes["agent"].pid)
    before = highest = process.memory_info().rss
    began = time.monotonic()
    # The shipped broker saves each change of QoS 1: some hundreds a second.
    acknowledged = min(messages // 20, 5000)
    flood(box.mqtt.port, acknowledged, 1)
    for start in range(acknowledged, messages, _PART):
        flood(box.mqtt.port, min(_PART, messages - start), 0)
        highest = max(highest, process.memory_info().rss)
    ping(box, console)
    took_s = time.monotonic() - began
    after = process.memory_info().rss
    return Figures(before / 2**20, max(highest, after) / 2**20, after / 2**20, took_s)


def ping(box: Box, console: RecordingConsole, timeout_s: float = 60) -> None:
    """Ask until the agent answers: a ping of QoS 1 is behind everything that was sent before."""
    name = new_id()
    console.publish(f"{_BASE}c2d/cmd/ping", b"", ResponseTopic=f"{_BASE}d2c/reply/{name}")

    def has_answered() -> bool:
        assert box.processes["agent"].poll() is None, box.read_log()[-3000:]
        return any(topic.endswith(name) for topic, _ in list(console.messages))

    wait_until(has_answered, timeout_s, "the agent answers a ping")


def main() -> None:
    """Print the figures of a flood."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--messages", type=int, default=0)
    parser.add_argument("--payloads", type=int, default=0)
    options = parser.parse_args()
    if options.payloads:
        began = time.monotonic()
        refused = read_all(iter_payloads(options.payloads))
        took_s = time.monotonic() - began
        print(f"{options.payloads} payloads, {refused} refused, nothing else, {took_s:.1f} s")
    if options.messages:
        with tempfile.TemporaryDirectory() as name:
            _flood_a_box(Path(name), options.messages)


def _flood_a_box(folder: Path, messages: int) -> None:
    mqtt, queue = MqttProcess(folder / "mqtt"), QueueProcess(folder / "queue")
    mqtt.start()
    queue.start()
    box = Box(folder, mqtt, queue)
    console = RecordingConsole(mqtt.port)
    try:
        box.start("agent")
        wait_until(lambda: console.find("status"), 30, "the agent is online")
        print(measure_flood(box, console, messages))
    finally:
        box.close()
        console.close()
        mqtt.stop()
        queue.stop()


if __name__ == "__main__":
    main()
