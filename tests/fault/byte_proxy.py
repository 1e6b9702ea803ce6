"""A TCP proxy that can leave connections half-open: accepted, kept, and never heard of again.

Owns a port on loopback and what goes through it to another port or to a Unix socket. It knows
no protocol. One thread with an event loop; all methods may be called from any thread.

A connection that was abandoned stays open on both sides for ever: neither FIN nor RST, nothing
forwarded in either direction. That is what a firewall leaves that forgot a connection, or a
cable that was pulled behind a switch.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

_HOST = "127.0.0.1"
_CHUNK = 65_536
_LIMIT_S = 10.0


class ByteProxy:
    """Forwards a loopback port, until it is told not to.

    Args:
        target: the port behind it, or the path of a Unix socket.
    """

    def __init__(self, target: int | Path) -> None:
        self.port = 0
        self.accepted = 0
        """Connections so far."""
        self._target = target
        self._abandoned = 0
        self._is_stalled = False
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="byte-proxy", daemon=True)
        self._thread.start()
        assert self._ready.wait(_LIMIT_S), "the proxy does not listen"

    def abandon(self) -> None:
        """Leave the present connections half-open; new ones work."""
        self._call(lambda: setattr(self, "_abandoned", self.accepted))

    def stall(self) -> None:
        """Leave the present connections half-open, and each new one too, until `resume`."""
        self.abandon()
        self._call(lambda: setattr(self, "_is_stalled", True))

    def resume(self) -> None:
        """Let new connections work again; the abandoned ones stay as they are."""
        self.abandon()
        self._call(lambda: setattr(self, "_is_stalled", False))

    def close(self) -> None:
        """Close everything and end the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_LIMIT_S)

    def _call(self, change: Callable[[], None]) -> None:
        done = threading.Event()

        def change_and_tell() -> None:
            change()
            done.set()

        self._loop.call_soon_threadsafe(change_and_tell)
        assert done.wait(_LIMIT_S), "the proxy does not answer"

    # --- the loop's thread -------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, _HOST, 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for writer in self._writers:
            writer.transport.abort()
        pending = asyncio.all_tasks(self._loop)
        for task in pending:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        number = self.accepted
        self._writers.add(writer)
        if self._is_stalled:
            return
        try:
            if isinstance(self._target, Path):
                up_reader, up_writer = await asyncio.open_unix_connection(self._target)
            else:
                up_reader, up_writer = await asyncio.open_connection(_HOST, self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(up_writer)
        # At the end of the thread.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(
                self._pump(number, reader, up_writer), self._pump(number, up_reader, writer)
            )

    async def _pump(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Forward one direction until a side closes or the connection is abandoned."""
        while True:
            try:
                data = await reader.read(_CHUNK)
            except OSError:
                data = b""
            if number <= self._abandoned:
                # Neither forwarded nor closed: the other side must find out by itself.
                return
            if not data:
                writer.close()
                return
            writer.write(data)
