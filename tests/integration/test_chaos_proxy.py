"""The bad network of the fault harness does what it says, and never tears a packet."""

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.fault.chaos.proxy import Link, Proxy
from tests.harness.waiting import wait_until

CONNECT = b"\x10\x03abc"
LONG = b"\x30\x80\x01" + b"x" * 128
RELIABLE = b"\x32\x06\x00\x01t\x00\x01!"
AGAIN = b"\x3a" + RELIABLE[1:]


class Sink:
    """A server that keeps what it gets and can answer."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.got = b""
        self.connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection:
                self.connection = connection
                self._read(connection)

    def _read(self, connection: socket.socket) -> None:
        try:
            while data := connection.recv(4096):
                self.got += data
        except OSError:
            return

    def close(self) -> None:
        # Closing alone does not wake a thread that waits in accept.
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(5)


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink()
    yield sink
    sink.close()


@pytest.fixture
def proxy(sink: Sink) -> Iterator[Proxy]:
    proxy = Proxy(sink.port)
    proxy.start()
    yield proxy
    proxy.stop()


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), 5) as client:
        yield client


def has_ended(client: socket.socket) -> bool:
    """Say whether the other side has closed or reset the connection."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_packets_pass_whole(sink: Sink, client: socket.socket) -> None:
    for byte in CONNECT + LONG:
        client.sendall(bytes([byte]))

    wait_until(lambda: sink.got == CONNECT + LONG, 5, "both packets arrive")


def test_half_a_packet_is_kept_back(sink: Sink, client: socket.socket) -> None:
    client.sendall(CONNECT + LONG[:50])

    wait_until(lambda: sink.got, 5, "the first packet arrives")
    assert sink.got == CONNECT


def test_a_reliable_publish_is_doubled_and_marked(
    sink: Sink, proxy: Proxy, client: socket.socket
) -> None:
    proxy.duplicate = 1.0
    client.sendall(RELIABLE + LONG * 6)

    wait_until(lambda: len(sink.got) == 2 * len(RELIABLE) + 6 * len(LONG), 5, "it comes twice")
    assert sink.got.startswith(RELIABLE)
    assert AGAIN in sink.got


def test_a_cut_ends_the_connection_and_refuses_others(
    sink: Sink, proxy: Proxy, client: socket.socket
) -> None:
    client.sendall(CONNECT)
    wait_until(lambda: sink.got, 5, "it is connected")
    proxy.set_link(Link.CUT)

    assert has_ended(client)
    with socket.create_connection(("127.0.0.1", proxy.port), 5) as other:
        assert has_ended(other)


def test_a_stall_holds_everything_and_loses_nothing(
    sink: Sink, proxy: Proxy, client: socket.socket
) -> None:
    client.sendall(CONNECT)
    wait_until(lambda: sink.got, 5, "it is connected")
    proxy.set_link(Link.STALLED)
    client.sendall(LONG)
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.recv(1)
    assert sink.got == CONNECT
    proxy.set_link(Link.GOOD)

    wait_until(lambda: sink.got == CONNECT + LONG, 5, "what was held arrives")


def test_a_connection_that_lost_packets_does_not_go_on(
    sink: Sink, proxy: Proxy, client: socket.socket
) -> None:
    client.sendall(CONNECT)
    wait_until(lambda: sink.got, 5, "it is connected")
    proxy.set_link(Link.DEAF_UP)
    client.sendall(LONG)
    wait_until(lambda: proxy.counts.swallowed == 1, 5, "it is swallowed")
    proxy.set_link(Link.GOOD)

    assert has_ended(client)
    assert sink.got == CONNECT


def test_one_direction_can_be_deaf_alone(sink: Sink, proxy: Proxy, client: socket.socket) -> None:
    client.sendall(CONNECT)
    wait_until(lambda: sink.got, 5, "it is connected")
    proxy.set_link(Link.DEAF_DOWN)
    assert sink.connection is not None
    sink.connection.sendall(CONNECT)
    client.sendall(LONG)

    wait_until(lambda: sink.got == CONNECT + LONG, 5, "the other direction goes on")
    wait_until(lambda: proxy.counts.swallowed == 1, 5, "the answer is swallowed")
