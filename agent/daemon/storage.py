"""Placeholder of the disk's watermark and reserve."""

from pathlib import Path
from typing import Any


class Storage:
    """The disk."""

    def __init__(self, data_dir: Path, min_free_bytes: int, ballast_bytes: int) -> None:
        del data_dir, min_free_bytes, ballast_bytes

    def is_low(self) -> bool:
        """Say whether it is low."""
        return False

    def release(self) -> bool:
        """Free the reserve."""
        return False

    def maintain(self) -> None:
        """Make the reserve."""

    def describe(self) -> dict[str, Any]:
        """Describe it."""
        return {}
