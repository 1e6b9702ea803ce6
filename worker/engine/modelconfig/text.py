"""Reading and writing the text of a `config.pbtxt`.

Owns the text form only: protobuf's own parser reads it, an unknown field is an error that
names its line. Whether what it says is offered here is `support`'s matter.
"""

import re
from dataclasses import dataclass

from worker.engine.modelconfig.message import ConfigMessage, get_config_class
from worker.errors import ModelConfigError

CONFIG_FILE = "config.pbtxt"
CONFIG_MAX_BYTES = 1 << 20

# Of its name there is one field in the whole schema, at the top; texts and comments may hold it.
_BATCH_FIELD = re.compile(r"\bmax_batch_size\s*:")
_NO_FIELDS = re.compile(r"""#.*|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'""")


@dataclass(frozen=True)
class ConfigText:
    """A `config.pbtxt` as it was written."""

    message: ConfigMessage
    origin: str
    """Where it is from, for errors."""
    has_batch_size: bool
    """`max_batch_size` stands in it, which proto3 cannot tell from a 0 that does not."""


def parse_config(text: str | bytes, origin: str = CONFIG_FILE) -> ConfigText:
    """Parse the text of a `config.pbtxt`.

    Raises:
        ModelConfigError: it is too large, no UTF-8, or malformed; names line and column.
    """
    config_class = get_config_class()
    from google.protobuf import text_format

    if len(text) > CONFIG_MAX_BYTES:
        msg = f"{origin} has {len(text)} bytes; at most {CONFIG_MAX_BYTES} are read"
        raise ModelConfigError(msg)
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        message = text_format.Parse(decoded, config_class())
    except (UnicodeDecodeError, text_format.ParseError, RecursionError) as exc:
        msg = f"{origin} is no model configuration: line {exc}"
        raise ModelConfigError(msg) from exc
    return ConfigText(message, origin, bool(_BATCH_FIELD.search(_NO_FIELDS.sub("", decoded))))


def format_config(message: ConfigMessage) -> str:
    """Return the text of a `config.pbtxt`."""
    from google.protobuf import text_format

    return str(text_format.MessageToString(message))
