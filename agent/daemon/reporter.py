"""Reporter: the outbox to MQTT, in order, a bounded window at a time.

Works inside the writer: `select` numbers the next records in the transaction,
`publish` sends them after the commit, `acknowledge` takes note of what the
broker has. Never publishes while offline.

Whose acknowledgement removes a record is the setting `outbox.ack`. The broker's
PUBACK only frees the window where a console acknowledges: then a record stays
until the console's cumulative number passes it, and is sent again when the
console's answer to a sync shows that it is missing there.

After a reconnect what was on its way is sent again first, in its order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from agent.clock import Clock, format_ms
from agent.commands import IdSeries
from agent.config import Settings
from agent.daemon.intake import ConsoleNews
from agent.daemon.messages import Acknowledged, Connected
from agent.daemon.mqtt import MqttSession, pack_properties
from agent.faults import reach
from agent.store import outbox
from agent.store.facts import CONSOLE_ACKS, read_fact, save_fact
from agent.store.outbox import Record

# A fast job's first state waits this long for its end, which then replaces it.
EARLY_HOLD_MS = 20
_BUSY_WAITING = 64
_HISTORIC_AFTER_MS = 60_000
_REPLAY_EVERY_MS = 1000
_ACKED = "acked"


@dataclass
class OutboxCounts:
    """What the reporter has done since the start."""

    published: int = 0
    republished: int = 0
    late: int = 0


@dataclass(frozen=True)
class Selected:
    """Records to publish after the commit, and the highest number given by then."""

    records: Sequence[Record] = ()
    last_seq: int | None = None
    """None: nothing was looked at."""


class Reporter:
    """Publishes outbox records.

    Args:
        settings: window, coalescing and whose acknowledgement counts.
        session: the MQTT session.
        clock: wall time.
    """

    def __init__(self, settings: Settings, session: MqttSession, clock: Clock) -> None:
        self._session = session
        self._ids = IdSeries()
        self._clock = clock
        self._limit = settings.mqtt.inflight
        self._mode = settings.outbox.ack
        self._coalesce_ms = int(settings.outbox.coalesce_s * 1000)
        self._conn: int | None = None
        self._window = self._limit
        self._in_flight: dict[int, int] = {}
        self._oldest_in_flight: int | None = None
        """The lowest number that was on its way when the last connection ended."""
        self._last_seq = 0
        self._resend_after = 0
        self._resend_upto = 0
        self._replay_from = 0
        self._replay_again_ms = 0
        self._boot = 0
        self._ledger = ""
        self._acked = 0
        self._heard: ConsoleNews | None = None
        """What this turn's transaction took in of the console; memory follows in `settle`."""
        self._console_acks = self._mode == "console"
        self.counts = OutboxCounts()
        self.has_more = False

    def start(self, tx: Connection, boot: int, ledger: str) -> None:
        """Take over where the last run left off."""
        self._boot = boot
        self._ledger = ledger
        self._last_seq = outbox.read_counter(tx, "seq")
        self._acked = outbox.read_counter(tx, _ACKED)
        if self._mode == "auto":
            self._console_acks = read_fact(tx, CONSOLE_ACKS) is not None
        # What was on its way when the last run ended is not known: at most a window of it.
        self._oldest_in_flight = max(1, self._last_seq - self._limit) if self._console_acks else 1

    @property
    def acknowledged_by(self) -> str:
        """Return whose acknowledgement removes records: `console` or `broker`."""
        return "console" if self._console_acks else "broker"

    def connected(self, event: Connected) -> None:
        """Begin a new connection: what was on its way is sent again first."""
        self._note_in_flight()
        self._conn = event.conn
        self._window = min(self._limit, event.receive_maximum)
        self._in_flight.clear()
        if self._oldest_in_flight is not None:
            self._resend_after = self._replay_from = self._oldest_in_flight - 1
            self._resend_upto = self._last_seq
        else:
            self._resend_after = self._resend_upto = 0

    def disconnected(self, conn: int) -> None:
        """End a connection."""
        if conn == self._conn:
            self._note_in_flight()
            self._conn = None

    def _note_in_flight(self) -> None:
        if self._conn is None:
            return
        waiting = [*self._in_flight.values()]
        if self._resend_after < self._resend_upto:
            waiting.append(self._resend_after + 1)
        self._oldest_in_flight = min(waiting, default=None)
        self._in_flight.clear()

    @property
    def in_flight(self) -> int:
        """How many records are published and not acknowledged by the broker."""
        return len(self._in_flight)

    def acknowledge(self, tx: Connection, acks: Iterable[Acknowledged]) -> int:
        """Remove records that the broker has, where that counts; return how many it has taken.

        Then `settle`.
        """
        seqs = [
            self._in_flight[ack.mid]
            for ack in acks
            if ack.conn == self._conn and ack.mid in self._in_flight
        ]
        if seqs and not self._console_acks:
            outbox.delete_acknowledged(tx, seqs)
            reach("outbox.acknowledged")
        return len(seqs)

    def hear(self, tx: Connection, news: ConsoleNews) -> None:
        """Write what a console acknowledges; then `settle`, which also sends again what it misses.

        A number that was never given is not believed: it is another ledger's.
        """
        # A turn that failed is run again, and must find all of this to do again.
        self._heard = None
        acked = news.acked_seq
        if acked is None or self._mode == "broker" or acked > self._last_seq:
            return
        if not self._console_acks:
            save_fact(tx, CONSOLE_ACKS, "1")
        if acked > self._acked:
            outbox.delete_upto(tx, acked)
            outbox.save_counter(tx, _ACKED, acked)
            reach("outbox.forgotten")
        self._heard = news

    def _replay(self, after: int) -> None:
        """Send again what the console does not have; what is being sent again goes on."""
        is_running = self._resend_after < self._resend_upto
        # A console that asks again while the answer is on its way must not begin it anew, and
        # many that ask must not make the device send its outbox for each.
        now_ms = self._clock.boot_ms()
        if now_ms < self._replay_again_ms and after >= self._replay_from:
            return
        if not is_running or after < self._replay_from:
            self._resend_after = self._replay_from = after
            self._replay_again_ms = now_ms + _REPLAY_EVERY_MS
        self._resend_upto = self._last_seq
        self.has_more = True
        reach("sync.answered")

    def settle(self, acks: Iterable[Acknowledged], selected: Selected) -> None:
        """Take note of a commit: these are acknowledged, those are numbered."""
        for ack in acks:
            if ack.conn == self._conn:
                self._in_flight.pop(ack.mid, None)
        if selected.last_seq is not None:
            self._settle_selected(selected, selected.last_seq)
        heard, self._heard = self._heard, None
        if heard is not None:
            self._console_acks = True
            self._acked = max(self._acked, heard.acked_seq or 0)
            if heard.replay_after is not None and self._conn is not None:
                self._replay(heard.replay_after)

    def _settle_selected(self, selected: Selected, last_seq: int) -> None:
        records = selected.records
        if records and records[-1].seq is not None and records[-1].seq <= self._last_seq:
            self._resend_after = records[-1].seq
            self.counts.republished += len(records)
            self.has_more = True
        self._last_seq = last_seq

    def select(self, tx: Connection, waiting_jobs: int, freed: int) -> Selected:
        """Return the next records to publish, numbered in this transaction.

        Args:
            tx: the writer's transaction.
            waiting_jobs: open jobs; under load, states before the end wait longer.
            freed: records that the broker has taken in this transaction.
        """
        room = self._window - len(self._in_flight) + freed
        self.has_more = False
        if self._conn is None or room <= 0:
            return Selected(last_seq=outbox.read_counter(tx, "seq"))
        if self._resend_after < self._resend_upto:
            records = outbox.find_sent(tx, self._resend_after, self._resend_upto, room)
            if records:
                return Selected(records, outbox.read_counter(tx, "seq"))
            self._resend_after = self._resend_upto
        busy = waiting_jobs > _BUSY_WAITING
        hold_ms = self._coalesce_ms if busy else EARLY_HOLD_MS
        before_ms = self._clock.wall_ms() - hold_ms
        records = outbox.take_unsent(tx, room, before_ms)
        self.has_more = outbox.has_unsent(tx)
        last_seq = records[-1].seq if records else outbox.read_counter(tx, "seq")
        return Selected(records, last_seq)

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
                self._note_unsent(record.seq)
                return
            self._in_flight[mid] = record.seq
            self.counts.published += 1
            self.counts.late += late
            reach("outbox.published")

    def _note_unsent(self, seq: int | None) -> None:
        """Let the next connection begin with the first record that could not be sent."""
        if seq is None:
            return
        if self._resend_after >= self._resend_upto or seq <= self._resend_after:
            self._resend_after, self._resend_upto = seq - 1, max(seq, self._last_seq)

    def _envelope(self, record: Record, message_id: str, *, late: bool) -> str:
        # Nothing but the body can hold a character that JSON escapes, and that is JSON already.
        return (
            f'{{"v":1,"id":"{message_id}","type":"{record.type}",'
            f'"ts":"{format_ms(record.created_ms)}","seq":{record.seq},"boot":{self._boot},'
            f'"ledger":"{self._ledger}",'
            f'"hist":{"true" if late else "false"},"body":{record.body}}}'
        )
