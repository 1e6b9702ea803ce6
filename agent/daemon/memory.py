"""Keeps the agent small: one heap, and free pages given back.

Source: mallopt(3), malloc_trim(3). Measured on Debian 12, x86-64, 2026-11-22,
after 8,000 jobs: one arena instead of one a thread saves 1.5 MB of 82.
"""

import ctypes
import gc
import sys
from typing import Any

_M_ARENA_MAX = -8


def _find_function(name: str) -> Any:
    """Return a function of glibc, or None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def limit_arenas() -> None:
    """Let all threads share one heap; before threads start. Only glibc has this."""
    mallopt = _find_function("mallopt")
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def release_memory() -> None:
    """Collect garbage and return free heap pages to the system; takes some milliseconds."""
    gc.collect()
    trim = _find_function("malloc_trim")
    if trim is not None:
        trim(0)
