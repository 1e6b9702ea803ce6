"""A model configuration as JSON: what `GET /v2/models/M/config` answers.

Owns Triton's form of it: the schema's field names in the schema's order, every default
printed, 64-bit numbers as numbers, messages and members of a choice only where they are set.

Source: answers of Triton 2.51, recorded in tests/data/triton_config.
"""

from typing import Any

from worker.engine.modelconfig.message import ConfigMessage


def to_json(message: ConfigMessage) -> dict[str, Any]:
    """Return the document of a message, JSON-ready."""
    found = {}
    for field in message.DESCRIPTOR.fields:
        # What is neither repeated nor a plain value is printed only where it is set. A
        # repeated field has no presence either, so this one question covers all three.
        if not field.has_presence or message.HasField(field.name):
            found[field.name] = _to_value(field, getattr(message, field.name))
    return found


def _to_value(field: Any, value: Any) -> Any:
    inner = field.message_type
    if inner is not None and inner.GetOptions().map_entry:
        of = inner.fields_by_name["value"]
        return {str(key): _to_plain(of, value[key]) for key in sorted(value)}
    if field.is_repeated:
        return [_to_plain(field, item) for item in value]
    return _to_plain(field, value)


def _to_plain(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return to_json(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else value
    return value
