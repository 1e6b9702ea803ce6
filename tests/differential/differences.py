"""What we answer otherwise than Triton 2.51, and why; each group has one reason.

A listed difference that is none any more fails the test too, so that the list stays true.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Difference(NamedTuple):
    """A difference that is meant."""

    what: tuple[str, ...]
    """Of `status`, `kind`, `encoding`, `values` and `shape`."""
    reason: str


_ALL = ("status", "values", "shape")
_ONLY_STATUS = ("status",)

_CLIENTS_FAULT = Difference(
    _ONLY_STATUS,
    "Triton says 500, as for a fault of its own; the request is wrong, and a client that tries a "
    "500 again would do so for ever",
)
_NOT_THERE = Difference(_ONLY_STATUS, "what is not there is a 404, whichever route asks for it")
_SEQUENCES = Difference(
    _ALL, "no model here keeps a state: a client that counts on one is told, not ignored"
)
_SMALL = Difference(("encoding",), "below 1 KiB an answer gains nothing from being compressed")
_VERSIONS = Difference(
    ("shape",), "every version is served here by its number unless a version_policy says otherwise"
)
_WHOLE = Difference(_ALL, "what does not fit is refused; Triton takes what it can get of it")

_DATATYPES = [
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP32",
    "FP64",
    "BYTES",
]
_BAD_JSON = [
    "no json",
    "half json",
    "array",
    "number",
    "null",
    "empty object",
    "rest behind json",
    "inputs null",
    "inputs an object",
    "outputs a number",
    "output a number",
    "output without a name",
    "parameters a list",
    "id a number",
    "priority a text",
    "priority negative",
    "timeout negative",
    "binary output a text",
    "no name",
    "name a number",
    "no datatype",
    "no shape",
    "shape a number",
    "shape of texts",
    "shape negative",
    "data null",
    "data a number",
    "data too short",
    "data too long",
    "data texts",
    "data fractions",
    "data true",
    "data null inside",
]

DIFFERENCES: Mapping[str, Difference] = {
    **{f"{datatype} json, no values": _CLIENTS_FAULT for datatype in _DATATYPES},
    **{f"broken: {name}": _CLIENTS_FAULT for name in _BAD_JSON},
    "head length too short": _CLIENTS_FAULT,
    "repository: index, no json": _CLIENTS_FAULT,
    "repository: index, ready a text": _CLIENTS_FAULT,
    "GET unknown model ready": _NOT_THERE,
    "GET unknown model stats": _NOT_THERE,
    "repository: load, unknown model": _NOT_THERE,
    "parameter sequence_id": _SEQUENCES,
    "parameter sequence_start": _SEQUENCES,
    "parameter sequence_end": _SEQUENCES,
    "gzip accepted": _SMALL,
    "deflate accepted": _SMALL,
    "damaged gzip": _WHOLE,
    "broken: data too large": _WHOLE,
    "shared memory": Difference(
        _ONLY_STATUS, "501 as for all that is not offered; Triton misses the region, 404"
    ),
    "all outputs binary but one": Difference(
        ("kind", "values"),
        "binary_data_output holds for every output that says nothing else, as Triton's "
        "documentation has it; Triton forgets it where outputs are named",
    ),
    "GET config": _VERSIONS,
    "GET config version": _VERSIONS,
    "FP16 json": Difference(_ALL, "works here; Triton takes and sends FP16 as bytes only"),
    "broken: not utf-8": Difference(
        ("status", "kind", "shape"), "Triton answers with JSON that is none"
    ),
    "broken: shape huge": Difference(
        ("status", "kind", "shape"), "Triton's process dies of this request"
    ),
}
