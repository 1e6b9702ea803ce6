"""The budget: how far a converted model may be from the original, as a person writes it.

    agreement=0.99,sqnr=20dB,top5=0.995,max_abs=0.01,size=0.3,latency=1.0,confident=0.95

Owns the reading of that text and the defaults by precision. Pure.
"""

from dataclasses import dataclass, fields, replace

from converters.errors import BudgetError
from platforms.artifact import Precision
from platforms.parity import Bounds

_DB = "db"


@dataclass(frozen=True)
class Budget:
    """Bounds on an artifact; None: not looked at."""

    agreement: float | None = None
    """Least share of golden rows with the same best class."""
    top5: float | None = None
    sqnr: float | None = None
    """Least signal to quantization noise, dB."""
    max_abs: float | None = None
    size: float | None = None
    """Most bytes, as a share of the uncompressed artifact's."""
    latency: float | None = None
    """Most p50 at batch 1, as a share of the uncompressed artifact's on the same runtime."""
    confident: float | None = None
    """Least agreement where the original is sure of itself: its best class has over a half."""

    def to_bounds(self) -> Bounds:
        """Return what parity is judged by."""
        return Bounds(self.agreement, self.top5, self.sqnr, self.max_abs)

    def to_text(self) -> str:
        """Return the text that it is read from."""
        known = ((item.name, getattr(self, item.name)) for item in fields(self))
        return ",".join(f"{name}={value:g}" for name, value in known if value is not None)


_DEFAULTS: dict[Precision, Budget] = {
    Precision.FP32: Budget(agreement=1.0, sqnr=60.0),
    Precision.FP16: Budget(agreement=0.99, sqnr=30.0),
    Precision.BF16: Budget(agreement=0.99, sqnr=20.0),
    Precision.INT8: Budget(agreement=0.99, sqnr=10.0),
    Precision.INT4_WEIGHTS: Budget(agreement=0.98, sqnr=10.0),
}
"""Where nothing is asked. FP32 differs by rounding only; 60 dB is one part in a thousand."""


def get_default_budget(precision: Precision) -> Budget:
    """Return the budget of an artifact that nobody has set one for."""
    return _DEFAULTS[precision]


def parse_budget(text: str) -> Budget:
    """Read a budget.

    Raises:
        BudgetError: it has an unknown key, a key twice, or a value that makes no sense.
    """
    known = {item.name for item in fields(Budget)}
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in known:
            msg = f"budget: {part!r} is none of {', '.join(sorted(known))}, such as agreement=0.99"
            raise BudgetError(msg)
        if name in found:
            msg = f"budget: {name} is given twice"
            raise BudgetError(msg)
        found[name] = _read_number(name, value)
    return Budget(**found)


def _read_number(name: str, value: str) -> float:
    text = value.lower()
    if name == "sqnr":
        text = text.removesuffix(_DB).strip()
    try:
        number = float(text)
    except ValueError as exc:
        msg = f"budget: {name}={value} is no number"
        raise BudgetError(msg) from exc
    is_share = name in ("agreement", "top5", "confident")
    if not 0 <= number < float("inf") or (is_share and number > 1):
        msg = f"budget: {name}={value} is out of range" + (": 0 to 1" if is_share else "")
        raise BudgetError(msg)
    return number


def merge_budgets(wanted: Budget | None, precision: Precision) -> Budget:
    """Return the budget of one artifact: what was asked; the default where parity was not."""
    default = get_default_budget(precision)
    if wanted is None:
        return default
    if precision is Precision.FP32:
        # A compressed artifact's allowance is none for one that only changes its format.
        return replace(default, size=None, latency=None)
    has_parity = any(
        value is not None for value in (wanted.agreement, wanted.top5, wanted.sqnr, wanted.max_abs)
    )
    if has_parity or wanted.confident is not None:
        return wanted
    return replace(wanted, agreement=default.agreement, sqnr=default.sqnr)
