"""Errors of the agent layer, each with its stable code.

AgentError
├── ConfigError             a setting is unknown or has a bad value
├── StoreError              the local store cannot do what was asked
│   ├── StorageFullError    no room for new work
│   └── StoreDamagedError   the ledger file is damaged
├── CommandError            a command from a console cannot be accepted as it stands
│   ├── MalformedError      it is not JSON of the envelope's form
│   ├── UnsupportedVersionError
│   ├── UnsupportedTypeError
│   ├── InvalidBodyError    the body does not fit its type's schema
│   ├── PayloadTooLargeError
│   ├── UnknownHandlerError no handler of that name
│   ├── ResponseTopicError  a reply would go where replies may not go
│   ├── QueueFullError      the ledger holds as many open jobs as it may
│   ├── QuarantinedError    the model version crashed its workers and is not served
│   └── IdConflictError     a known job id with another body
├── IllegalTransitionError  a job cannot go from its state to that one
├── ModelError              something about the model repository
│   ├── ModelNotFoundError
│   ├── VersionNotFoundError
│   ├── ManifestError       a manifest is missing, malformed or contradicts its files
│   ├── DigestMismatchError a file is not what its manifest says
│   ├── RepositoryBusyError another process holds the repository's lock
│   └── ReleaseError        a release is malformed or not what was asked for
├── InputError              a job's input cannot be read
│   ├── PathNotAllowedError the path leaves the configured roots
│   ├── InputNotFoundError
│   └── InputTooLargeError
├── LeaseError              a lease cannot be taken or given back
├── BrokerUnavailableError  the queue or MQTT broker does not answer
└── MetricsError            metrics cannot be served
"""

from typing import ClassVar


class AgentError(Exception):
    """Anything the agent layer reports to its callers."""

    code: ClassVar[str] = "agent_error"
    retryable: ClassVar[bool] = False


class ConfigError(AgentError):
    """A setting is unknown, misspelt or has a value that cannot be used."""

    code = "bad_config"


class StoreError(AgentError):
    """The local store cannot do what was asked."""

    code = "store_error"
    retryable = True


class StorageFullError(StoreError):
    """The disk has no room for new work; nothing was acknowledged."""

    code = "storage_full"


class StoreDamagedError(StoreError):
    """The ledger file is damaged or of an unknown version."""

    code = "store_damaged"
    retryable = False


class CommandError(AgentError):
    """A command cannot be accepted as it stands."""

    code = "bad_command"


class MalformedError(CommandError):
    """The payload is not UTF-8 JSON of the envelope's form."""

    code = "malformed"


class UnsupportedVersionError(CommandError):
    """The envelope's major version is not spoken here."""

    code = "unsupported_version"


class UnsupportedTypeError(CommandError):
    """The envelope's type is not known here, or not on that topic."""

    code = "unsupported_type"


class InvalidBodyError(CommandError):
    """The body does not fit the schema of its type."""

    code = "invalid_body"


class PayloadTooLargeError(CommandError):
    """The payload is over 256 KiB; larger inputs go by reference."""

    code = "payload_too_large"


class UnknownHandlerError(CommandError):
    """The job names a handler that is not registered."""

    code = "unknown_handler"


class ResponseTopicError(CommandError):
    """A command's response topic is missing, or is not below the device's `d2c/reply/`."""

    code = "response_topic_refused"


class QueueFullError(CommandError):
    """The ledger holds as many open jobs as the settings allow."""

    code = "queue_full"
    retryable = True


class QuarantinedError(CommandError):
    """The model version crashed its workers and is not served until a person releases it."""

    code = "model_quarantined"


class IdConflictError(CommandError):
    """A known job id came with another body; the original stands."""

    code = "id_conflict"


class IllegalTransitionError(AgentError):
    """A job cannot go from its state to the one asked for."""

    code = "illegal_transition"


class ModelError(AgentError):
    """Something about the model repository."""

    code = "model_error"


class ModelNotFoundError(ModelError):
    """No model of that name is in the repository, or none of its versions is active."""

    code = "unknown_model"


class VersionNotFoundError(ModelError):
    """The model has no such version."""

    code = "unknown_version"


class ManifestError(ModelError):
    """A manifest is missing, malformed, or contradicts the files beside it."""

    code = "bad_manifest"


class ReleaseError(ModelError):
    """A release is malformed, or is not the one that was asked for."""

    code = "bad_release"


class DigestMismatchError(ModelError):
    """A file's sha256 or size is not what its manifest says."""

    code = "digest_mismatch"


class RepositoryBusyError(ModelError):
    """Another process is changing the model repository."""

    code = "repository_busy"
    retryable = True


class InputError(AgentError):
    """A job's input cannot be read."""

    code = "bad_input"


class PathNotAllowedError(InputError):
    """The path is outside the configured roots, or goes through a link."""

    code = "path_not_allowed"


class InputNotFoundError(InputError):
    """The file that the job names does not exist or is no regular file."""

    code = "input_not_found"


class InputTooLargeError(InputError):
    """The input is over the configured size."""

    code = "input_too_large"


class LeaseError(AgentError):
    """A lease has a bad name or duration, or its file cannot be written or removed."""

    code = "lease_error"


class BrokerUnavailableError(AgentError):
    """The queue broker or the MQTT broker does not answer."""

    code = "broker_unavailable"
    retryable = True


class MetricsError(AgentError):
    """The agent's metrics cannot be served."""

    code = "metrics_unavailable"
