"""Errors of the conversion layer.

ConversionError            the root; what a caller decides differently becomes a subclass of it
├── CalibrationError       the data to calibrate with cannot be used
├── RecipeError            a recipe is unknown, or does not apply to this model or these options
├── CompressionError       a recipe's tool failed on a model that it should take
├── ToolMissingError       the library of a tool is not installed; names the extra
└── TrainingError          the data of a training loop cannot be used, or the loop found no net
"""

from typing import ClassVar


class ConversionError(Exception):
    """Anything the conversion layer reports to its callers."""

    code: ClassVar[str] = "conversion_error"
    retryable: ClassVar[bool] = False


class CalibrationError(ConversionError):
    """Calibration data is missing, too little, or not what the model takes."""

    code = "bad_calibration"


class RecipeError(ConversionError):
    """There is no such recipe, or it does not apply to the model or the options given."""

    code = "bad_recipe"


class CompressionError(ConversionError):
    """A recipe's tool failed on a model that it should take."""

    code = "compression_failed"


class ToolMissingError(ConversionError):
    """The library of a conversion tool is not installed, or cannot be imported here."""

    code = "tool_missing"


class TrainingError(ConversionError):
    """Training data is not what the net takes, or training ended without a usable net."""

    code = "training_failed"
