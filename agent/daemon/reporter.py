"""Reporter: the outbox to MQTT, in order, a bounded window at a time.

Works inside the writer: `select` numbers the next records in the transaction,
`publish` sends them after the commit, `acknowledge` removes what the broker
has taken. After a reconnect everything numbered and unacknowledged is sent
again, in its order, before anything new. Never publishes while offline.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from agent.clock import Clock, format_ms
from agent.commands import IdSeries
from agent.config import Settings
from agent.daemon.messages import Acknowledged, Connected
from agent.daemon.mqtt import MqttSession, pack_properties
from agent.store import outbox
from agent.store.outbox import Record

# A fast job's first state waits this long for its end, which then replaces it.
EARLY_HOLD_MS = 20
_BUSY_WAITING = 64
_HISTORIC_AFTER_MS = 60_000


@dataclass
class OutboxCounts:
    """What the reporter has done since the start."""

    published: int = 0
    republished: int = 0
    late: int = 0


class Reporter:
    """Publishes outbox records.

    Args:
        settings: window and coalescing.
        session: the MQTT session.
        clock: wall time.
    """

    def __init__(self, settings: Settings, session: MqttSession, clock: Clock) -> None:
        self._session = session
        self._ids = IdSeries()
        self._clock = clock
        self._limit = settings.mqtt.inflight
        self._coalesce_ms = int(settings.outbox.coalesce_s * 1000)
        self._conn: int | None = None
        self._window = self._limit
        self._in_flight: dict[int, int] = {}
        self._next_seq = 1
        self._resend_after = 0
        self._resend_upto = 0
        self._boot = 0
        self.counts = OutboxCounts()
        self.has_more = False

    def start(self, tx: Connection, boot: int) -> None:
        """Take over the numbering where the last run left it."""
        self._boot = boot
        self._next_seq = outbox.read_counter(tx, "seq") + 1

    def connected(self, event: Connected) -> None:
        """Begin a new connection: everything unacknowledged is sent again first."""
        self._conn = event.conn
        self._window = min(self._limit, event.receive_maximum)
        self._in_flight.clear()
        self._resend_after, self._resend_upto = 0, self._next_seq - 1

    def disconnected(self, conn: int) -> None:
        """End a connection."""
        if conn == self._conn:
            self._conn = None
            self._in_flight.clear()

    @property
    def in_flight(self) -> int:
        """How many records are published and not acknowledged."""
        return len(self._in_flight)

    def acknowledge(self, tx: Connection, acks: Iterable[Acknowledged]) -> int:
        """Remove records that the broker has taken; return how many. Then `settle`."""
        seqs = [
            self._in_flight[ack.mid]
            for ack in acks
            if ack.conn == self._conn and ack.mid in self._in_flight
        ]
        outbox.delete_acknowledged(tx, seqs)
        return len(seqs)

    def settle(self, acks: Iterable[Acknowledged], selected: Sequence[Record]) -> None:
        """Take note of a commit: these are acknowledged, those are numbered."""
        self._advance(selected)
        for ack in acks:
            if ack.conn == self._conn:
                self._in_flight.pop(ack.mid, None)

    def select(self, tx: Connection, waiting_jobs: int, freed: int) -> list[Record]:
        """Return the next records to publish, numbered in this transaction.

        Changes nothing in memory, so a transaction that is rolled back leaves no
        gap: `publish` follows the commit.

        Args:
            tx: the writer's transaction.
            waiting_jobs: open jobs; under load, states before the end wait longer.
            freed: records acknowledged in this transaction.
        """
        room = self._window - len(self._in_flight) + freed
        self.has_more = False
        if self._conn is None or room <= 0:
            return []
        if self._resend_after < self._resend_upto:
            records = outbox.find_sent(tx, self._resend_after, self._resend_upto, room)
            if records:
                return records
        busy = waiting_jobs > _BUSY_WAITING
        hold_ms = self._coalesce_ms if busy else EARLY_HOLD_MS
        before_ms = self._clock.wall_ms() - hold_ms
        records = outbox.take_unsent(tx, room, before_ms, self._next_seq)
        self.has_more = outbox.has_unsent(tx)
        return records

    def publish(self, records: Iterable[Record]) -> None:
        """Send committed records; each is remembered by its message id until acknowledged."""
        now_ms = self._clock.wall_ms()
        for record in records:
            late = now_ms - record.created_ms > _HISTORIC_AFTER_MS
            message_id = self._ids.next()
            mid = self._session.publish(
                record.topic,
                self._envelope(record, message_id, late=late),
                retain=record.retained,
                properties=pack_properties(
                    correlation=message_id.encode(),
                    expiry_s=record.ttl_s,
                    message_type=record.type,
                ),
            )
            if mid is None or record.seq is None:
                # Offline: it is numbered and committed, the next connection sends it.
                return
            self._in_flight[mid] = record.seq
            self.counts.published += 1
            self.counts.late += late

    def _advance(self, records: Sequence[Record]) -> None:
        """Take note of the numbers that are committed."""
        if not records or records[-1].seq is None:
            return
        last = records[-1].seq
        if last < self._next_seq:
            self._resend_after = last
            self.counts.republished += len(records)
            self.has_more = True
        else:
            self._next_seq = last + 1

    def _envelope(self, record: Record, message_id: str, *, late: bool) -> str:
        # Nothing but the body can hold a character that JSON escapes, and that is JSON already.
        return (
            f'{{"v":1,"id":"{message_id}","type":"{record.type}",'
            f'"ts":"{format_ms(record.created_ms)}","seq":{record.seq},"boot":{self._boot},'
            f'"hist":{"true" if late else "false"},"body":{record.body}}}'
        )
