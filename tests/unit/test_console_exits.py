import pytest

from agent.errors import (
    AgentError,
    BrokerUnavailableError,
    ConfigError,
    InputNotFoundError,
    ManifestError,
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
    ChildStartError,
    ConsoleError,
    ConsoleStoreError,
    DemoStepError,
    InlineTooLargeError,
    InputFileError,
    JobNotFoundError,
    PlotMissingError,
    PublishMissingError,
    ReleaseExistsError,
    ReleaseRepositoryError,
    RolloutBusyError,
    RolloutNotFoundError,
    RolloutOrderError,
    RolloutPlanError,
    SigningKeyError,
    WaitTimedOutError,
)
from console.exits import Exit, code_of, exit_of
from platforms.errors import MeasuringError, NoArtifactError, PlatformError
from worker.errors import BadImageError, ReleaseUnknownError, WorkerError

# Typed out: scripts rely on these numbers.
EXPECTED: dict[type[Exception], int] = {
    ConfigError: 2,
    BaselineMismatchError: 2,
    RolloutPlanError: 2,
    ModelNotFoundError: 3,
    VersionNotFoundError: 3,
    InputNotFoundError: 3,
    JobNotFoundError: 3,
    RolloutNotFoundError: 3,
    BrokerUnavailableError: 4,
    BrokerMissingError: 4,
    WaitTimedOutError: 6,
    AgentDownError: 7,
    AlreadyUpError: 8,
    AlreadyListeningError: 8,
    RepositoryBusyError: 8,
    RolloutBusyError: 8,
    AgentError: 1,
    PlatformError: 1,
    WorkerError: 1,
    ConsoleError: 1,
    ConsoleStoreError: 1,
    ManifestError: 1,
    NoArtifactError: 1,
    BadImageError: 1,
    InputFileError: 1,
    InlineTooLargeError: 1,
    ChildStartError: 1,
    DemoStepError: 1,
    MeasuringError: 1,
    PlotMissingError: 1,
    RolloutOrderError: 1,
    PublishMissingError: 1,
    ReleaseRepositoryError: 1,
    ReleaseExistsError: 1,
    SigningKeyError: 1,
    ReleaseUnknownError: 3,
}


def find_subclasses(kind: type[Exception]) -> set[type[Exception]]:
    below = set(kind.__subclasses__())
    return below.union(*[find_subclasses(item) for item in below])


@pytest.mark.parametrize(("kind", "code"), list(EXPECTED.items()))
def test_each_error_ends_with_its_number(kind: type[Exception], code: int) -> None:
    assert exit_of(kind("why")) == code


def test_numbers_of_exits_stay_as_they_are() -> None:
    assert {item.name: item.value for item in Exit} == {
        "OK": 0,
        "ERROR": 1,
        "USAGE": 2,
        "NOT_FOUND": 3,
        "BROKER": 4,
        "NOT_AS_ASKED": 5,
        "TIMED_OUT": 6,
        "AGENT_DOWN": 7,
        "BUSY": 8,
    }


def test_console_errors_have_codes_of_their_own_and_a_docstring() -> None:
    kinds: set[type[Exception]] = {ConsoleError, *find_subclasses(ConsoleError)}
    assert kinds <= EXPECTED.keys()
    assert len({code_of(kind("why")) for kind in kinds}) == len(kinds)
    assert all(kind.__doc__ for kind in kinds)
