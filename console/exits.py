"""Exit codes of `edgeward`, stable for scripts.

    0  done
    1  any other error; a rollout was stopped by errors
    2  wrong usage, or a setting that is unknown or has a bad value
    3  no such model, version, job, rollout or input file
    4  a broker is not reachable, or not installed
    5  a job ended, but not as asked: a submit did not succeed, a cancel came too late;
       a rollout ended before its last group, without errors: paused, aborted, nobody answers
    6  timed out waiting; what was asked may still happen
    7  the agent does not run
    8  busy: another process holds the data folder, the model repository, the console's store or
       the rollouts' state
    130  interrupted by Ctrl-C

Owns the table from errors to codes and nothing else.
"""

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType

from agent.errors import (
    AgentError,
    BrokerUnavailableError,
    ConfigError,
    InputNotFoundError,
    ModelNotFoundError,
    RepositoryBusyError,
    VersionNotFoundError,
)
from console.errors import (
    AgentDownError,
    AlreadyListeningError,
    AlreadyUpError,
    BaselineMismatchError,
    BrokerMissingError,
    ConsoleError,
    JobNotFoundError,
    RolloutBusyError,
    RolloutNotFoundError,
    RolloutPlanError,
    WaitTimedOutError,
)
from converters.errors import ConversionError
from platforms.errors import PlatformError
from worker.errors import ReleaseUnknownError, WorkerError


class Exit(IntEnum):
    """What the process ends with."""

    OK = 0
    ERROR = 1
    USAGE = 2
    NOT_FOUND = 3
    BROKER = 4
    NOT_AS_ASKED = 5
    TIMED_OUT = 6
    AGENT_DOWN = 7
    BUSY = 8


EXPECTED_ERRORS = (AgentError, ConsoleError, ConversionError, PlatformError, WorkerError)
"""The roots of what is told to a person in one line, without a traceback."""

EXITS: Mapping[type[Exception], Exit] = MappingProxyType(
    {
        ConfigError: Exit.USAGE,
        BaselineMismatchError: Exit.USAGE,
        RolloutPlanError: Exit.USAGE,
        ModelNotFoundError: Exit.NOT_FOUND,
        VersionNotFoundError: Exit.NOT_FOUND,
        InputNotFoundError: Exit.NOT_FOUND,
        JobNotFoundError: Exit.NOT_FOUND,
        RolloutNotFoundError: Exit.NOT_FOUND,
        ReleaseUnknownError: Exit.NOT_FOUND,
        BrokerUnavailableError: Exit.BROKER,
        BrokerMissingError: Exit.BROKER,
        WaitTimedOutError: Exit.TIMED_OUT,
        AgentDownError: Exit.AGENT_DOWN,
        AlreadyListeningError: Exit.BUSY,
        AlreadyUpError: Exit.BUSY,
        RepositoryBusyError: Exit.BUSY,
        RolloutBusyError: Exit.BUSY,
    }
)
"""An error's class, or its nearest ancestor in here, gives the exit code; else 1."""


def exit_of(error: BaseException) -> Exit:
    """Return the exit code of an error."""
    return next((EXITS[kind] for kind in type(error).__mro__ if kind in EXITS), Exit.ERROR)


def code_of(error: BaseException) -> str:
    """Return an error's stable code."""
    return str(getattr(error, "code", "internal_error"))
