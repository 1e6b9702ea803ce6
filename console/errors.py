"""Errors of the console layer, each with its stable code.

ConsoleError
├── BrokerMissingError    no program that could serve as a broker is installed
├── ChildStartError       a child process did not get ready
├── AlreadyUpError        another `edgeward up` owns the data folder
├── AgentDownError        what was asked needs the agent, and it does not run
├── JobNotFoundError      the ledger has no such job
├── WaitTimedOutError     what was waited for did not come in time
├── ConsoleStoreError     the file of `edgeward console` cannot be used
├── AlreadyListeningError another `edgeward console listen` uses the file
├── BaselineMismatchError a baseline is of another box, another model or other conditions
├── PlotMissingError      the plotting library is not installed
├── ReleaseRepositoryError  a folder is no release repository, or would become an inconsistent one
│   └── ReleaseExistsError    that version was released with other content
├── SigningKeyError       a signing key is missing, damaged, or where it must not be
├── PublishMissingError   the signing library is not installed
├── DemoStepError         a step of the demo did not show what it should
├── RolloutPlanError      the groups, thresholds or times of a rollout make no sense
├── RolloutOrderError     a rollout's state does not allow what was asked
├── RolloutNotFoundError  the state folder has no such rollout, or no device fits a new one
├── RolloutBusyError      another process works on the same state folder
└── InputFileError        a file named on the command line cannot be used as an input
    └── InlineTooLargeError   it is too large to travel inside a command
"""

from typing import ClassVar


class ConsoleError(Exception):
    """Anything the command line reports that is not a lower layer's own error."""

    code: ClassVar[str] = "console_error"
    retryable: ClassVar[bool] = False


class BrokerMissingError(ConsoleError):
    """No program that could serve as a broker is installed, or none of them runs here."""

    code = "broker_missing"


class ChildStartError(ConsoleError):
    """A child process ended, or stayed silent for too long, before it was ready."""

    code = "child_start_failed"
    retryable = True


class AlreadyUpError(ConsoleError):
    """Another `edgeward up` runs on the same data folder."""

    code = "already_up"


class AgentDownError(ConsoleError):
    """The agent of this data folder does not run."""

    code = "agent_down"
    retryable = True


class JobNotFoundError(ConsoleError):
    """The ledger has no job of that id."""

    code = "unknown_job"


class WaitTimedOutError(ConsoleError):
    """What was waited for did not come in time; it may still come."""

    code = "wait_timed_out"
    retryable = True


class ConsoleStoreError(ConsoleError):
    """The file that `edgeward console` was given is missing, or none that it can use."""

    code = "bad_console_store"


class AlreadyListeningError(ConsoleError):
    """Another `edgeward console listen` uses the same file."""

    code = "already_listening"


class BaselineMismatchError(ConsoleError):
    """A baseline is of another box, another model, or was measured under other conditions."""

    code = "baseline_mismatch"


class PlotMissingError(ConsoleError):
    """The plotting library is not installed."""

    code = "plot_missing"


class ReleaseRepositoryError(ConsoleError):
    """A folder is no release repository, is damaged, or would become inconsistent."""

    code = "bad_release_repository"


class ReleaseExistsError(ReleaseRepositoryError):
    """That version of the model was released with other content; it stays as it is."""

    code = "release_exists"


class SigningKeyError(ConsoleError):
    """A signing key is missing, damaged, in the repository, or there already."""

    code = "bad_signing_key"


class PublishMissingError(ConsoleError):
    """The library that signs is not installed; a box that only verifies does without."""

    code = "publish_missing"


class DemoStepError(ConsoleError):
    """A step of the demo did not show what it should."""

    code = "demo_step_failed"


class RolloutPlanError(ConsoleError):
    """The groups, thresholds or times that were given for a rollout make no sense."""

    code = "bad_rollout_plan"


class RolloutOrderError(ConsoleError):
    """A rollout is in a state that does not allow what was asked."""

    code = "rollout_order_refused"


class RolloutNotFoundError(ConsoleError):
    """The state folder has no rollout of that id, or no device fits a new one."""

    code = "unknown_rollout"


class RolloutBusyError(ConsoleError):
    """Another process works on the same state folder: a desired state has one writer."""

    code = "rollout_busy"
    retryable = True


class InputFileError(ConsoleError):
    """A file named on the command line is missing, unreadable or not of the form it should be."""

    code = "bad_input_file"


class InlineTooLargeError(InputFileError):
    """A file is too large to travel inside a command; it can go by reference."""

    code = "inline_too_large"
