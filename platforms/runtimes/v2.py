"""A remote V2 server (Open Inference Protocol over HTTP) behind `Runtime`.

Owns the client's side of the protocol with binary tensors, and the small JSON file that
stands for the model: `{"url": "http://host:8000", "model": "digits", "version": "1"}`;
`version` may be absent (the server's choice), `timeout_s` too (60).

Nothing is computed on this box. Connections are kept for the next run, one per run that
goes on at the same time; a `RunStop` shuts its run's connection down, which ends the wait
here, not necessarily the server's work. A request on a kept connection that the server
closed is sent once more: an inference changes nothing, repeating one is harmless.

Source: https://github.com/kserve/open-inference-protocol and Triton's binary extension
(`protocol/extension_binary_data.md`); engine.md of this project for the details measured.
"""

import http.client
import json
import socket
import threading
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, urlsplit

import numpy as np

from platforms.artifact import ArtifactFormat, Datatype, TensorSpec
from platforms.errors import InferenceError, ModelLoadError, RunStoppedError, TensorError
from platforms.runtimes.base import DTYPES, Array, LoadOptions, RunStop, Runtime, Session

_HEADER = "Inference-Header-Content-Length"
_TIMEOUT_S = 60.0
_OK, _BAD_REQUEST = 200, 400
_ERRORS = (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, IndexError)


@dataclass(frozen=True)
class _Address:
    host: str
    port: int
    is_tls: bool
    path: str
    timeout_s: float

    def connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.is_tls else http.client.HTTPConnection
        return kind(self.host, self.port, timeout=self.timeout_s)


class _Refused(Exception):  # noqa: N818 - an answer of the server, made an error by its reader
    """The server answered with a status other than 200."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"status {status}: {reason}")
        self.status = status


class V2Session(Session):
    """One model of a remote server, over connections that are kept."""

    def __init__(
        self, address: _Address, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        """Keep the address and what the server says about the model."""
        provider = f"{address.host}:{address.port}"
        super().__init__(V2Runtime.name, provider, inputs, outputs)
        self._address = address
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._is_closed = False

    def _run(self, inputs: Mapping[str, Array], stop: RunStop | None) -> dict[str, Array]:
        if self._is_closed:
            msg = "the session is closed"
            raise InferenceError(msg)
        body, header_bytes = self._encode(inputs)
        headers = {_HEADER: str(header_bytes), "Content-Type": "application/octet-stream"}
        try:
            answer, tail = self._post(body, headers, stop)
            return _decode(answer, tail, self.outputs)
        except _Refused as exc:
            kind = TensorError if exc.status == _BAD_REQUEST else InferenceError
            msg = f"{self.provider} refuses the request: {exc}"
            raise kind(msg) from exc
        except _ERRORS as exc:
            if stop is not None and stop.is_set:
                msg = "the run was stopped; its connection is closed"
                raise RunStoppedError(msg) from exc
            msg = f"no answer from {self.provider}: {exc!r}"
            raise InferenceError(msg) from exc

    def _encode(self, inputs: Mapping[str, Array]) -> tuple[bytes, int]:
        described, parts = [], []
        for spec in self.inputs:
            part = _to_bytes(spec, inputs[spec.name])
            parts.append(part)
            described.append(
                {
                    "name": spec.name,
                    "datatype": spec.datatype.value,
                    "shape": list(inputs[spec.name].shape),
                    "parameters": {"binary_data_size": len(part)},
                }
            )
        asked = {"inputs": described, "parameters": {"binary_data_output": True}}
        header = json.dumps(asked).encode()
        return b"".join((header, *parts)), len(header)

    def _post(
        self, body: bytes, headers: dict[str, str], stop: RunStop | None
    ) -> tuple[dict[str, Any], bytes]:
        with self._lock:
            kept = self._idle.pop() if self._idle else None
        if kept is not None:
            try:
                return self._exchange(kept, body, headers, stop)
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                if stop is not None and stop.is_set:
                    raise
        return self._exchange(self._address.connect(), body, headers, stop)

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        body: bytes,
        headers: dict[str, str],
        stop: RunStop | None,
    ) -> tuple[dict[str, Any], bytes]:
        is_kept, hangup = False, None
        try:
            if connection.sock is None:
                # http.client sets TCP_NODELAY itself.
                connection.connect()
            if stop is not None:
                # Any: typeshed calls it None until connected and cannot see that it is.
                connected: Any = connection.sock
                hangup = _Hangup(connected)
                stop.connect(hangup)
            connection.request("POST", f"{self._address.path}/infer", body, headers)
            answer = _read_answer(connection)
            is_kept = True
        except _Refused:
            is_kept = True
            raise
        finally:
            if hangup is not None:
                hangup.disarm()
            self._give_back(connection, is_kept=is_kept)
        return answer

    def _give_back(self, connection: http.client.HTTPConnection, *, is_kept: bool) -> None:
        with self._lock:
            if is_kept and not self._is_closed:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Refuse further runs; a connection that is in use goes when its run ends."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


class _Hangup:
    """The end of one run: its socket is shut down, which wakes whoever reads from it."""

    def __init__(self, connected: socket.socket) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = connected

    def __call__(self) -> None:
        with self._lock:
            if self._socket is not None:
                # The server may have hung up first.
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def disarm(self) -> None:
        """Forget the socket: a stop that comes too late must not hit the next run on it."""
        with self._lock:
            self._socket = None


class V2Runtime(Runtime):
    """A model on another machine that speaks V2 over HTTP."""

    name: ClassVar[str] = "v2"
    extra: ClassVar[str] = ""
    formats: ClassVar[frozenset[ArtifactFormat]] = frozenset({ArtifactFormat.V2})
    is_proof_needed: ClassVar[bool] = False

    def version(self) -> str:
        """Return the protocol's version."""
        return "2"

    def providers(self) -> tuple[str, ...]:
        """Return the one way there is."""
        return ("http",)

    def _load(self, path: Path, options: LoadOptions) -> Session:
        try:
            address = _read_address(path)
            with closing(address.connect()) as connection:
                connection.request("GET", address.path)
                metadata, _ = _read_answer(connection)
            inputs, outputs = _to_specs(metadata["inputs"]), _to_specs(metadata["outputs"])
        except (*_ERRORS, _Refused) as exc:
            msg = f"{path.name} leads to no model of a V2 server: {exc}"
            raise ModelLoadError(msg) from exc
        return V2Session(address, inputs, outputs)


def _read_address(path: Path) -> _Address:
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or not {"url", "model"} <= document.keys():
        msg = 'it must be an object with "url" and "model"'
        raise ValueError(msg)
    url = urlsplit(str(document["url"]))
    if url.scheme not in ("http", "https") or url.hostname is None:
        msg = f"{document['url']!r} is no http or https address"
        raise ValueError(msg)
    is_tls = url.scheme == "https"
    model = quote(str(document["model"]), safe="")
    place = f"{url.path.rstrip('/')}/v2/models/{model}"
    if document.get("version"):
        place += f"/versions/{quote(str(document['version']), safe='')}"
    timeout_s = float(document.get("timeout_s", _TIMEOUT_S))
    return _Address(url.hostname, url.port or (443 if is_tls else 80), is_tls, place, timeout_s)


def _read_answer(connection: http.client.HTTPConnection) -> tuple[dict[str, Any], bytes]:
    """Return the answer's JSON and its binary tail."""
    response = connection.getresponse()
    content = response.read()
    if response.status != _OK:
        raise _Refused(response.status, content[:500].decode("utf-8", "replace"))
    split = int(response.getheader(_HEADER) or len(content))
    answer = json.loads(content[:split])
    if not isinstance(answer, dict):
        msg = "the server's JSON is no object"
        raise TypeError(msg)
    return answer, content[split:]


def _to_specs(described: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    specs = tuple(
        TensorSpec(str(item["name"]), Datatype(item["datatype"]), tuple(map(int, item["shape"])))
        for item in described
    )
    for spec in specs:
        if spec.datatype not in DTYPES:
            msg = f"{spec.name} is {spec.datatype}, which cannot be passed to or from a model here"
            raise ValueError(msg)
    return specs


def _to_bytes(spec: TensorSpec, value: Array) -> bytes:
    if spec.datatype is not Datatype.BYTES:
        return np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes()
    texts = [str(item).encode() for item in value.ravel()]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def _decode(
    answer: dict[str, Any], tail: bytes, declared: tuple[TensorSpec, ...]
) -> dict[str, Array]:
    found: dict[str, Array] = {}
    start = 0
    for item in answer["outputs"]:
        size = item.get("parameters", {}).get("binary_data_size")
        dtype = DTYPES[Datatype(item["datatype"])]
        if size is None:
            found[item["name"]] = np.asarray(item["data"], dtype).reshape(item["shape"])
            continue
        part, start = tail[start : start + size], start + size
        values = _read_texts(part) if dtype.hasobject else _read_numbers(part, dtype)
        found[item["name"]] = values.reshape(item["shape"])
    missing = {spec.name for spec in declared} - found.keys()
    if missing:
        msg = f"the answer lacks the output {', '.join(sorted(missing))}"
        raise ValueError(msg)
    return found


def _read_numbers(part: bytes, dtype: np.dtype[Any]) -> Array:
    numbers: Array = np.frombuffer(part, dtype.newbyteorder("<")).astype(dtype)
    return numbers


def _read_texts(part: bytes) -> Array:
    texts, place = [], 0
    while place < len(part):
        size = int.from_bytes(part[place : place + 4], "little")
        texts.append(part[place + 4 : place + 4 + size].decode())
        place += 4 + size
    return np.array(texts, dtype=object)
