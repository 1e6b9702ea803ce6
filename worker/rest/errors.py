"""Errors of the HTTP front end, and the status that each error of ours has on the wire.

ServingError (worker.errors)
├── RequestFormatError        the request is not one of the protocol
│   ├── UnsupportedRequestError   it asks for something of Triton's that is not offered here
│   └── BodyTooLargeError         its body is larger than `http.body_bytes`
└── ServerBusyError           as many requests, or bytes of them, are under way as may be
(`worker.rest.predict.PredictionError` is a WorkerError that carries an error of the engine.)

Source of the statuses: the table in Triton's `src/http_server.cc`: 400 for a bad request, 404 for
what is not there, 501 for what is not offered, 503 for what may work later, 500 for a failed run.
"""

from typing import ClassVar

import orjson

from agent.errors import ModelNotFoundError, VersionNotFoundError
from platforms.errors import PlatformError, TensorError
from worker.errors import (
    OutOfMemoryError,
    PreprocessError,
    ServingError,
    UnsupportedConfigError,
)


class RequestFormatError(ServingError):
    """The request is not one of the protocol: not its JSON, its tensors or its headers."""

    code = "bad_request"


class UnsupportedRequestError(RequestFormatError):
    """The request asks for something of Triton's that is not offered here."""

    code = "unsupported_request"


class BodyTooLargeError(RequestFormatError):
    """The request's body is larger than `http.body_bytes`, as sent or decompressed."""

    code = "body_too_large"


class ServerBusyError(ServingError):
    """As many requests, or as many bytes of them, are under way as the settings allow."""

    code = "server_busy"
    retryable: ClassVar[bool] = True


_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (ModelNotFoundError, 404),
    (VersionNotFoundError, 404),
    (UnsupportedRequestError, 501),
    (UnsupportedConfigError, 501),
    (BodyTooLargeError, 413),
    (RequestFormatError, 400),
    (TensorError, 400),
    (PreprocessError, 400),
    (OutOfMemoryError, 503),
    (ServingError, 503),
    (PlatformError, 500),
)
INTERNAL = 500


def find_status(error: Exception) -> int:
    """Return the HTTP status of an error of ours."""
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return status
    return INTERNAL


def encode_error(message: str) -> bytes:
    """Return the protocol's error body."""
    # A message may quote bytes that came in as lone surrogates.
    return orjson.dumps({"error": message.encode("utf-8", "replace").decode()})
