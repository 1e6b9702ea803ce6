"""What a job's sender may wish for and rarely does, kept as one JSON column."""

from pydantic import BaseModel, ConfigDict

from agent.commands import UPDATE, SubmitBody, encode
from agent.window import Window


class JobOptions(BaseModel):
    """Wishes of a job beside the common ones. Source: docs/protocol.md, "Submit"."""

    model_config = ConfigDict(frozen=True, extra="ignore", cache_strings="keys")

    on_error: str = "retry"
    retry_delay_s: float | None = None
    progress_timeout_s: float | None = None
    on_full: str = "keep_newest"
    window: Window | None = None


DEFAULT_OPTIONS = JobOptions()


def pack_options(body: SubmitBody) -> str | None:
    """Return the options of a submit as JSON, None where all are the usual ones."""
    options = JobOptions(
        on_error=body.on_error,
        retry_delay_s=body.retry_delay_s,
        progress_timeout_s=body.progress_timeout_s,
        on_full=body.on_full,
        # An update is fetched and staged at any time: its window is for the activation.
        window=None if body.handler == UPDATE else body.window,
    )
    return None if options == DEFAULT_OPTIONS else encode(options.model_dump(exclude_none=True))


def read_options(text: str | None) -> JobOptions:
    """Return the options that a row keeps."""
    return JobOptions.model_validate_json(text) if text else DEFAULT_OPTIONS
