"""Where the box's HTTP API is, and whether it answers.

Owns its address in words, and the question after its health. Knows nothing of what it serves.
"""

import ssl
import time
from contextlib import closing
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection

from agent.sections import HttpSettings

READY_S = 10.0
"""The worker's own readiness comes first, so that this is only its HTTP server's time."""
_POLL_S = 0.05
_ANSWER_S = 1.0
# A server on all addresses is asked on this machine's own.
_OWN = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def name_address(http: HttpSettings) -> str:
    """Return where the HTTP API of these settings is, in words for a person."""
    names = []
    if http.port is not None:
        scheme = "http" if http.cert_file is None else "https"
        host = f"[{http.host}]" if ":" in http.host else http.host
        names.append(f"{scheme}://{host}:{http.port}")
    if http.socket is not None:
        names.append(str(http.socket))
    return ", ".join(names) or "turned off"


def wait_until_live(http: HttpSettings, timeout_s: float = READY_S) -> bool:
    """Say whether the HTTP API answers within a time; True where no TCP port is wanted."""
    if http.port is None:
        return True
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        if _is_live(http, http.port):
            return True
        time.sleep(_POLL_S)
    return False


def _is_live(http: HttpSettings, port: int) -> bool:
    host = _OWN.get(http.host, http.host)
    connection: HTTPConnection
    if http.cert_file is None:
        connection = HTTPConnection(host, port, timeout=_ANSWER_S)
    else:
        # Whether it is there is asked, not who it is.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = HTTPSConnection(host, port, timeout=_ANSWER_S, context=context)
    with closing(connection):
        try:
            connection.request("GET", "/v2/health/live")
            return connection.getresponse().status == HTTPStatus.OK
        except (OSError, HTTPException):
            return False
