"""A bad network between the agent and its MQTT broker: a TCP proxy that knows MQTT's packets.

Owns a listening port on loopback and every connection through it. One thread with an event
loop; all methods may be called from any thread.

Invariants: whole packets are forwarded, or none of one, so a fault never damages MQTT's
framing; what a one-sided drop swallowed is never followed by later packets of the same
connection, because TCP would not do that either: such a connection is cut at the end.

Duplicates: a QoS 1 PUBLISH is sent twice now and then, at once or some packets later, in
both directions. So a bridge would do, or a broker that replays.
"""

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tests.fault.chaos.wire import Wire

_HOST = "127.0.0.1"
_PUBLISH = 3
_DUP_BIT = 0x08
_LATER_PACKETS = 5
_DELAY_S = 0.2
_START_LIMIT_S = 10.0


class Link(StrEnum):
    """What the network is like."""

    GOOD = "good"
    CUT = "cut"
    """Connections are reset, new ones refused."""
    STALLED = "stalled"
    """Nothing is forwarded, nothing is closed: half-open for both."""
    DEAF_UP = "deaf_up"
    """What the agent sends vanishes."""
    DEAF_DOWN = "deaf_down"
    """What the broker sends vanishes."""
    SLOW = "slow"
    """Each packet takes 0.1–0.3 s longer."""
    LOST = "lost"
    """All IP packets are lost; only on a wire."""
    LOSSY = "lossy"
    """A third of the IP packets is lost; only on a wire."""


@dataclass
class ProxyCounts:
    """What the proxy has done to the traffic."""

    connections: int = 0
    packets: int = 0
    duplicated: int = 0
    swallowed: int = 0


class Proxy:
    """Forwards a loopback port to another, as well as `link` lets it.

    Args:
        target_port: the broker's port.
        seed: of the choice of packets to send twice.
        duplicate: probability that a PUBLISH of QoS 1 is sent twice.
        wire: where the agent is, if not on loopback.
    """

    def __init__(
        self, target_port: int, seed: int = 0, duplicate: float = 0.0, wire: Wire | None = None
    ) -> None:
        self.duplicate = duplicate
        self.host = _HOST if wire is None else wire.host
        self._wire = wire
        self.counts = ProxyCounts()
        self.port = 0
        self._target_port = target_port
        self._rng = random.Random(seed)
        self._link = Link.GOOD
        self._loop = asyncio.new_event_loop()
        self._moving = asyncio.Event()
        self._pairs: set[_Pair] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    @property
    def link(self) -> Link:
        """What the network is like now."""
        return self._link

    def start(self) -> None:
        """Listen on a free port; `port` says which."""
        self._thread.start()
        assert self._ready.wait(_START_LIMIT_S), "the proxy does not listen"

    def stop(self) -> None:
        """Close everything and end the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_LIMIT_S)

    def set_link(self, link: Link) -> None:
        """Change the network; returns when that has happened."""
        if self._wire is not None:
            self._set_wire(self._wire, link)
        done = threading.Event()

        def change() -> None:
            self._change(link)
            done.set()

        self._loop.call_soon_threadsafe(change)
        done.wait(_START_LIMIT_S)

    def _set_wire(self, wire: Wire, link: Link) -> None:
        if link is Link.LOST:
            wire.drop()
        elif link is Link.LOSSY:
            wire.drop_some()
        else:
            wire.mend()

    def cut_once(self) -> None:
        """Reset the present connections; new ones may come at once."""
        self._loop.call_soon_threadsafe(self._reset_pairs)

    # --- the loop's thread -------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._moving.set()
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, self.host, 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._reset_pairs()
        pending = asyncio.all_tasks(self._loop)
        for task in pending:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        self._loop.close()

    def _change(self, link: Link) -> None:
        was_lossy = self._link in (Link.DEAF_UP, Link.DEAF_DOWN)
        self._link = link
        if link is Link.CUT or was_lossy:
            self._reset_pairs()
        if link is Link.STALLED:
            self._moving.clear()
        else:
            self._moving.set()

    def _reset_pairs(self) -> None:
        for pair in list(self._pairs):
            pair.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts.connections += 1
        if self._link is Link.CUT:
            writer.transport.abort()
            return
        await self._moving.wait()
        try:
            up = await asyncio.open_connection(_HOST, self._target_port)
        except OSError:
            writer.transport.abort()
            return
        pair = _Pair(writer, up[1])
        self._pairs.add(pair)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await pair.run(
                    self._pump(reader, up[1], lambda: self._link is Link.DEAF_UP),
                    self._pump(up[0], writer, lambda: self._link is Link.DEAF_DOWN),
                )
        finally:
            self._pairs.discard(pair)
            pair.abort()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        is_deaf: Callable[[], bool],
    ) -> None:
        """Forward one direction, packet by packet, until a side closes."""
        late: list[tuple[int, bytes]] = []
        count = 0
        while True:
            packet = await read_packet(reader)
            await self._moving.wait()
            if self._link is Link.SLOW:
                await asyncio.sleep(self._rng.uniform(0.5, 1.5) * _DELAY_S)
            count += 1
            self.counts.packets += 1
            if is_deaf():
                self.counts.swallowed += 1
                continue
            writer.write(packet)
            if is_reliable_publish(packet) and self._rng.random() < self.duplicate:
                self.counts.duplicated += 1
                again = bytes([packet[0] | _DUP_BIT]) + packet[1:]
                late.append((count + self._rng.randint(0, _LATER_PACKETS), again))
            while late and late[0][0] <= count:
                writer.write(late.pop(0)[1])
            await writer.drain()


class _Pair:
    """The two sides of one connection."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self._writers = writers

    async def run(self, *pumps: Coroutine[Any, Any, None]) -> None:
        """Run both directions until one of them ends."""
        tasks = [asyncio.ensure_future(pump) for pump in pumps]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    def abort(self) -> None:
        """Reset both sides."""
        for writer in self._writers:
            writer.transport.abort()


async def read_packet(reader: asyncio.StreamReader) -> bytes:
    """Return the next MQTT control packet, whole.

    Source: MQTT 5.0, 2.1: one byte of type and flags, then the length, seven bits a byte.

    Raises:
        asyncio.IncompleteReadError: the connection ended.
    """
    head = await reader.readexactly(1)
    length = shift = 0
    while True:
        byte = await reader.readexactly(1)
        head += byte
        length |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:
            break
    return head + (await reader.readexactly(length) if length else b"")


def is_reliable_publish(packet: bytes) -> bool:
    """Say whether a packet is a PUBLISH of QoS 1."""
    return packet[0] >> 4 == _PUBLISH and (packet[0] >> 1) & 0x03 == 1
