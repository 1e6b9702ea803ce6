"""Waiting for a condition, and for nothing else: no test sleeps for a fixed time."""

import os
import shutil
import threading
import time
from collections.abc import Callable

import pytest

from console.embedded import find_free_port

_POLL_S = 0.02
_SYSTEM_PATHS = "/usr/sbin:/usr/local/sbin:/sbin"

__all__ = ["free_port", "require_binary", "wait_until"]

free_port = find_free_port


def wait_until(predicate: Callable[[], object], timeout_s: float, message: str) -> None:
    """Return as soon as the predicate holds.

    Raises:
        AssertionError: it did not within `timeout_s`; its text is `message`.
    """
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not predicate():
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {message}")
        pause.wait(_POLL_S)


def require_binary(name: str) -> str:
    """Return the path of a program; without it skip the test, or fail it where CI is set."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM_PATHS}")
    if found is None:
        text = f"{name} is not installed: ./run test installs what the tests need"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    return found
