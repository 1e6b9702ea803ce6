"""Errors of the conversion layer.

ConversionError    the root; what a caller decides differently becomes a subclass of it
"""

from typing import ClassVar


class ConversionError(Exception):
    """Anything the conversion layer reports to its callers."""

    code: ClassVar[str] = "conversion_error"
    retryable: ClassVar[bool] = False
