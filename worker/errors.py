"""Errors of the worker, each with its stable code.

WorkerError
├── PreprocessError         a job's input is not what the model's first step takes
│   └── BadImageError       the bytes are no image that may be decoded
├── OutputError             a model's outputs cannot become a result
│   └── NanOutputError      they hold NaN, or an infinite number where JSON needs a finite one
├── StepError               a manifest's processing cannot be set up
│   ├── UnknownStepError    it names a step that is not installed
│   └── StepParamsError     it gives a step parameters that it does not take
├── ModelConfigError        a model's config.pbtxt cannot be used as it stands
│   └── UnsupportedConfigError  it asks for something of Triton's that is not offered here
├── OutOfMemoryError        not even one row fits into memory
├── NotProvenError          a version must not serve on this box: staging found none of it right
├── FetchError              a file of a release cannot be fetched
│   ├── SourceUnavailableError  the source does not answer, or stops answering; part files stay
│   │   └── SourceMissingError  it answers that it has no such file
│   ├── SourceAddressError  the source's address may not be used
│   ├── SourceAnswerError   an answer is not one to the question asked
│   │   └── RedirectRefusedError  it sends elsewhere
│   ├── WrongLengthError    the source's file is longer or shorter than the release says
│   ├── WrongHashError      what came is not what the release says
│   ├── NoRoomError         the disk has not the room for it and the reserve
│   ├── FetchBusyError      another process is fetching the same file
│   ├── FetchCanceledError  whoever asked for it no longer wants it; part files stay
│   └── ChunkIndexError     a list of chunks is malformed or contradicts its file
├── TrustError              a release is not what those whom this box trusts have signed
│   ├── ReleaseExpiredError     a signature's time is over: frozen, or not signed again
│   ├── ReleaseUnknownError     nobody whom this box trusts has signed such a release
│   ├── BundleError             a bundle file holds what no bundle holds
│   ├── TrustBusyError          another process uses the same trust folder
│   └── TrustFolderError        the trust folder cannot be written
└── ServingError            a request for an answer at once was not taken
    ├── ModelUnavailableError  the model has been unloaded, or does not load
    ├── MemoryBudgetError      models that are in use leave it no room
    ├── RequestRejectedError   too many wait already
    ├── RequestTimeoutError    it waited too long for its turn
    └── HttpUnavailableError   the server cannot start: address, certificate, package
"""

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from agent.choice import ChoiceRecord


class WorkerError(Exception):
    """Anything the worker reports to its callers."""

    code: ClassVar[str] = "worker_error"
    retryable: ClassVar[bool] = False


class PreprocessError(WorkerError):
    """A job's input is not what the model's preprocessing takes."""

    code = "bad_input_data"


class BadImageError(PreprocessError):
    """The bytes are no image, a damaged one, or one too large to decode."""

    code = "bad_image"


class OutputError(WorkerError):
    """A model's outputs do not fit the postprocessing that its manifest names."""

    code = "bad_model_output"


class NanOutputError(OutputError):
    """The model answered with NaN, or with an infinite number that JSON cannot carry."""

    code = "nan_output"


class StepError(WorkerError):
    """The processing that a manifest names cannot be set up."""

    code = "bad_processing"


class UnknownStepError(StepError):
    """The manifest names a processing step that is not installed, or cannot be loaded."""

    code = "unknown_processing_step"


class StepParamsError(StepError):
    """The manifest gives a processing step parameters that it does not take."""

    code = "bad_processing_params"


class ModelConfigError(WorkerError):
    """A model's `config.pbtxt` or serving keys are malformed, or contradict its graph."""

    code = "bad_model_config"


class UnsupportedConfigError(ModelConfigError):
    """A model's `config.pbtxt` asks for something of Triton's that is not offered here."""

    code = "unsupported_config"


class OutOfMemoryError(WorkerError):
    """A model cannot run on a single row with the memory that there is."""

    code = "out_of_memory"
    retryable = True


class FetchError(WorkerError):
    """A file of a release cannot be fetched."""

    code = "fetch_failed"


class SourceUnavailableError(FetchError):
    """The source does not answer, or stops answering; what has come is kept and taken up again."""

    code = "source_unavailable"
    retryable = True


class SourceMissingError(SourceUnavailableError):
    """The source answers, but has no such file, or does not give it to this box."""

    code = "source_missing"


class SourceAddressError(FetchError):
    """The source's address may not be used: malformed, without TLS, or outside its folder."""

    code = "bad_source_address"


class SourceAnswerError(FetchError):
    """The source's answer is not one to the question: another range, or encoded content."""

    code = "bad_source_answer"


class RedirectRefusedError(SourceAnswerError):
    """The source sends elsewhere; a release comes from the address that was configured."""

    code = "redirect_refused"


class WrongLengthError(FetchError):
    """The source's file is longer or shorter than the release says."""

    code = "wrong_length"


class WrongHashError(FetchError):
    """What was fetched whole does not have the sha256 that the release says."""

    code = "wrong_hash"


class NoRoomError(FetchError):
    """The disk has not the room for the files and the reserve that is to stay free."""

    code = "no_room"
    retryable = True


class FetchBusyError(FetchError):
    """Another process is fetching the same file into the same store."""

    code = "fetch_busy"
    retryable = True


class FetchCanceledError(FetchError):
    """Whoever asked for the file no longer wants it; what has come is kept."""

    code = "fetch_canceled"


class ChunkIndexError(FetchError):
    """A list of chunks is malformed, too large, or contradicts its file."""

    code = "bad_chunk_index"


class TrustError(WorkerError):
    """Metadata or a release is not what those whom this box trusts have signed last."""

    code = "release_untrusted"


class ReleaseExpiredError(TrustError):
    """Metadata is past the time that its signer gave it: held back, or not signed again."""

    code = "release_expired"


class ReleaseUnknownError(TrustError):
    """Nobody whom this box trusts for that model has signed a release of that version."""

    code = "release_unknown"


class BundleError(TrustError):
    """A bundle file is torn, or holds something that no bundle holds."""

    code = "bad_bundle"


class TrustBusyError(TrustError):
    """Another process is verifying with the same trust folder."""

    code = "trust_busy"
    retryable = True


class TrustFolderError(TrustError):
    """The trust folder cannot be read or written: no room, no permission, a bad disk."""

    code = "trust_folder_unusable"
    retryable = True


class ServingError(WorkerError):
    """A request for an answer at once was not taken."""

    code = "not_served"


class ModelUnavailableError(ServingError):
    """The model has been unloaded, or it does not load."""

    code = "model_unavailable"
    retryable = True


class MemoryBudgetError(ServingError):
    """A model does not fit into `worker.memory_mb` beside those that cannot be evicted."""

    code = "memory_budget"
    retryable = True


class RequestRejectedError(ServingError):
    """Too many requests for this model wait already."""

    code = "too_many_requests"
    retryable = True


class RequestTimeoutError(ServingError):
    """The request waited longer for its turn than it may."""

    code = "request_timeout"
    retryable = True


class HttpUnavailableError(ServingError):
    """The HTTP server cannot start: its address, certificate or token, or a package is missing."""

    code = "http_unavailable"


class NotProvenError(WorkerError):
    """Staging found no artifact of a version that may serve on this box.

    Args:
        record: with the reason for each candidate.
    """

    code = "update_refused"

    def __init__(self, record: "ChoiceRecord") -> None:
        super().__init__(f"{record.name} {record.release}: {record.reason}")
        self.record = record
