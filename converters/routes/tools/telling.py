"""What every tool tells of its work, in one form.

{"inputs", "outputs": [{"name", "datatype", "shape"}], "operators": {name: count},
"is_batch_free", "precision", "tools": {distribution: version}, "notes": [text]}
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from converters.task import Facts
from platforms.artifact import Precision, TensorSpec


def tell(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    operators: Mapping[str, int],
    precision: Precision,
    distributions: Iterable[str],
    notes: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the facts that all tools tell."""
    return {
        "inputs": [encode_spec(spec) for spec in inputs],
        "outputs": [encode_spec(spec) for spec in outputs],
        "is_batch_free": bool(inputs) and all(spec.has_free_batch for spec in inputs),
        "operators": dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        "precision": precision.value,
        "tools": {name: found for name in distributions if (found := _find_version(name))},
        "notes": [*notes],
    }


def encode_spec(spec: TensorSpec) -> dict[str, Any]:
    """Return a tensor as the manifest has it."""
    return {"name": spec.name, "datatype": spec.datatype.value, "shape": list(spec.shape)}


def compare_types(wanted: Sequence[TensorSpec], found: Sequence[TensorSpec]) -> list[str]:
    """Return a note for each tensor that has another datatype than the source's."""
    return [
        f"{mine.name} is {mine.datatype} here, {theirs.datatype} in the source"
        for theirs, mine in zip(wanted, found, strict=True)
        if theirs.datatype is not mine.datatype
    ]


def _find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


__all__ = ["Facts", "compare_types", "encode_spec", "tell"]
