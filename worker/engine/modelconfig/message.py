"""The protobuf message `inference.ModelConfig`, without generated code and without grpcio.

Owns the loading of Triton's schema (`schema/model_config.desc`: the serialised
FileDescriptorProto of `model_config.proto` as tritonclient 2.73 ships it, BSD-3, licence
beside it) into a descriptor pool of its own, so that an installed tritonclient, which has
a message of the same name, does not clash. Imports protobuf when first asked.
"""

from functools import cache
from importlib.resources import files
from typing import Any

from worker.errors import ModelConfigError

ConfigMessage = Any
"""A message of `inference.ModelConfig`; its class is made at run time."""

_SCHEMA = "schema/model_config.desc"


@cache
def get_config_class() -> Any:
    """Return the class of `inference.ModelConfig`.

    Raises:
        ModelConfigError: protobuf is not installed; names the extra.
    """
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError as exc:
        msg = "a config.pbtxt needs protobuf to be read: pip install 'edgeward[serve]'"
        raise ModelConfigError(msg) from exc
    data = files("worker.engine.modelconfig").joinpath(_SCHEMA).read_bytes()
    pool = descriptor_pool.DescriptorPool()
    pool.Add(descriptor_pb2.FileDescriptorProto.FromString(data))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
