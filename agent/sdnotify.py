"""Tells systemd how the service is (sd_notify). Does nothing where systemd does not ask."""

import os
import socket


def notify(state: str) -> None:
    """Send `state`, such as `READY=1`, to the service manager.

    Source: sd_notify(3), protocol of systemd 252.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    path = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(state.encode(), path)


def watchdog_period_s() -> float | None:
    """Return how often to send `WATCHDOG=1` (half of systemd's limit), or None."""
    limit_us = os.environ.get("WATCHDOG_USEC")
    return int(limit_us) / 2e6 if limit_us else None
