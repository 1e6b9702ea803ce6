"""Errors of the conversion layer.

ConversionError                the root; what a caller decides differently becomes a subclass of it
├── SourceError                what was given is no model, or not one that is read here
│   ├── PickledModelError      a pickle: reading it would run a stranger's code
│   ├── OutsideDataError       weights lie outside the model's own folder
│   └── OversizedTensorError   tensors that the file cannot hold are declared
├── NoRouteError               no chain of tools leads from the source to the target
├── ToolMissingError           a tool's packages are not installed; names the extra
├── OperatorError              an operator cannot be converted; names it
├── HopError                   a step was ended, or its result is refused
│   ├── HopTimeoutError        it took longer than it may
│   ├── HopMemoryError         it took more memory than it may
│   ├── HopFailedError         its tool failed, died, or left nothing behind
│   └── InputChangedError      its tool overwrote what it was given
├── BudgetError                a budget cannot be read
├── OutputExistsError          the folder for the result has something in it
├── MilOperatorError           the reference interpreter does not know an operator; names it
├── ReportError                a file is no report of a conversion
├── CalibrationError           the data to calibrate with cannot be used
├── RecipeError                a recipe is unknown, or does not apply to this model or these options
├── CompressionError           a recipe's tool failed on a model that it should take
├── TrainingError              the data of a training loop cannot be used, or the loop found no net
└── ConversionCanceledError    the caller called it off
"""

from typing import ClassVar


class ConversionError(Exception):
    """Anything the conversion layer reports to its callers."""

    code: ClassVar[str] = "conversion_error"
    retryable: ClassVar[bool] = False


class SourceError(ConversionError):
    """What was given is no model, or not one that can be read."""

    code = "bad_source"


class PickledModelError(SourceError):
    """The file is a pickle with more in it than tensors; it was not loaded."""

    code = "pickle_refused"


class OutsideDataError(SourceError):
    """The model names weights that lie outside its own folder."""

    code = "outside_data"


class OversizedTensorError(SourceError):
    """The model declares tensors far larger than what its files hold."""

    code = "oversized_tensor"


class NoRouteError(ConversionError):
    """No chain of tools leads from this source to this target."""

    code = "no_route"


class ToolMissingError(ConversionError):
    """What a tool needs is not installed, or it does not run on this machine."""

    code = "tool_missing"


class OperatorError(ConversionError):
    """An operator of the model has no form in the target.

    Args:
        message: for a person.
        operator: its name in the source's own words.
        node: where it stands, if that is known.
    """

    code = "unsupported_operator"

    def __init__(self, message: str, operator: str = "", node: str = "") -> None:
        super().__init__(message)
        self.operator = operator
        self.node = node


class HopError(ConversionError):
    """A step of a conversion was ended, or what it left is refused.

    Args:
        message: for a person.
        log: the end of what its tool printed.
    """

    code = "hop_error"

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class HopTimeoutError(HopError):
    """A step took longer than it may, and was ended."""

    code = "hop_timeout"


class HopMemoryError(HopError):
    """A step took more memory than it may, and was ended."""

    code = "hop_memory"


class HopFailedError(HopError):
    """A step's tool failed, died, or left nothing behind; the message has its last lines."""

    code = "hop_failed"


class InputChangedError(HopError):
    """A step's input changed under it; what came out of it is not used."""

    code = "input_changed"


class BudgetError(ConversionError):
    """A budget has an unknown key, a key twice, or a value that makes no sense."""

    code = "bad_budget"


class ReportError(ConversionError):
    """A file is not there, or is no report of a conversion."""

    code = "bad_report"


class MilOperatorError(ConversionError):
    """A Core ML program has something in it that its reference interpreter cannot compute.

    Args:
        message: for a person.
        operator: its name in the program.
        node: where it stands, if that is known.
    """

    code = "unknown_mil_operator"

    def __init__(self, message: str, operator: str = "", node: str = "") -> None:
        super().__init__(message)
        self.operator = operator
        self.node = node


class OutputExistsError(ConversionError):
    """The folder that the result is to be written to has something in it."""

    code = "output_exists"


class CalibrationError(ConversionError):
    """Calibration data is missing, too little, or not what the model takes."""

    code = "bad_calibration"


class RecipeError(ConversionError):
    """There is no such recipe, or it does not apply to the model or the options given."""

    code = "bad_recipe"


class CompressionError(ConversionError):
    """A recipe's tool failed on a model that it should take."""

    code = "compression_failed"


class TrainingError(ConversionError):
    """Training data is not what the net takes, or training ended without a usable net."""

    code = "training_failed"


class ConversionCanceledError(ConversionError):
    """The caller called the conversion off."""

    code = "conversion_canceled"
