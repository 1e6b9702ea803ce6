"""gzip and deflate of bodies, with a bound on what comes out.

Invariants: never more than the bound is decompressed, however small the body; a body that is
damaged, cut off or followed by anything is refused.
"""

import gzip
import zlib
from functools import lru_cache

from worker.rest.errors import BodyTooLargeError, RequestFormatError, UnsupportedRequestError

COMPRESS_FROM_BYTES = 1024
"""Smaller answers are sent as they are: the aio client offers compression with each request, and a
few hundred bytes gain nothing from it."""

LEVEL = 1
"""Of answers: tensors of floats hardly shrink further, and each level costs."""

_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32
_ENCODINGS = ("gzip", "deflate")


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """Return a body as it was before its `Content-Encoding`; blocks, releases the GIL.

    Raises:
        UnsupportedRequestError: the encoding is neither gzip nor deflate.
        BodyTooLargeError: it is more than `limit` bytes.
        RequestFormatError: it is damaged.
    """
    kind = encoding.strip().lower()
    if kind in ("", "identity"):
        return body
    if kind not in _ENCODINGS:
        msg = f"Content-Encoding {kind:.40}: only gzip and deflate are supported"
        raise UnsupportedRequestError(msg)
    stream = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        found = stream.decompress(body, limit + 1)
    except zlib.error as exc:
        msg = f"the body is no {kind}: {exc}"
        raise RequestFormatError(msg) from exc
    if len(found) > limit:
        msg = f"the body is over {limit} bytes when decompressed"
        raise BodyTooLargeError(msg)
    if not stream.eof or stream.unused_data:
        msg = f"the body is no whole {kind}"
        raise RequestFormatError(msg)
    return found


def compress(body: bytes, encoding: str) -> bytes:
    """Return a body in one of the encodings that `choose_encoding` returns."""
    if encoding == "gzip":
        return gzip.compress(body, LEVEL, mtime=0)
    return zlib.compress(body, LEVEL)


@lru_cache(256)
def choose_encoding(accepted: bytes) -> str | None:
    """Return the encoding of an answer, from `Accept-Encoding`; None: as it is."""
    best, best_quality = None, 0.0
    for item in accepted.decode("latin-1").lower().split(","):
        name, _, parameters = item.partition(";")
        name = "gzip" if name.strip() == "*" else name.strip()
        quality = _parse_quality(parameters)
        if name in _ENCODINGS and quality > best_quality:
            best, best_quality = name, quality
    return best


def _parse_quality(parameters: str) -> float:
    key, _, value = parameters.partition("=")
    if key.strip() != "q":
        return 1.0
    try:
        return float(value)
    except ValueError:
        return 0.0
