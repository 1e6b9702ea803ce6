"""Every error has a code of its own, says what it means, and stands in docs/errors.md."""

import ast
import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterator

import pytest

import agent
import console
import converters
import platforms
import worker
from agent.errors import AgentError
from console.errors import ConsoleError
from converters.errors import ConversionError
from platforms.errors import PlatformError
from tests.architecture.documents import ROOT, find_section, iter_rows, read_document
from worker.errors import WorkerError

ROOTS: tuple[type[Exception], ...] = (
    AgentError,
    ConsoleError,
    ConversionError,
    PlatformError,
    WorkerError,
)
PACKAGES = (agent, console, converters, platforms, worker)
# An entry point that runs on import, and migrations, which only Alembic may import.
_NOT_IMPORTED = ("platforms.tether", "console.embedded_mqtt", "agent.store.migrations.env")

# Reasons that no exception carries: the job state machine's own words. From docs/protocol.md.
JOB_REASONS = {
    "ok",
    "canceled",
    "deadline_passed",
    "too_old",
    "worker_lost",
    "queue_restarted",
    "queue_unreachable",
    "attempts_exhausted",
    "interrupted",
    "internal_error",
    "run_timeout",
    "bad_file_name",
    "worker_crashed",
    "poison_job",
    "payload_damaged",
    "dedupe_dropped",
    "replaced",
    "outbox_full",
    "progress_timeout",
    "staged",
    "committed",
    "version_bad",
    "update_in_progress",
    "probation_errors",
    "probation_disagreement",
    "probation_slow",
    "probation_memory",
    "probation_crash",
    "probation_hang",
    "power_lost",
    "changed_locally",
}


def import_everything() -> None:
    """Import all of our modules, so that every subclass is known."""
    for package in PACKAGES:
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            is_migration = ".migrations.versions." in found.name
            if found.name not in _NOT_IMPORTED and not is_migration:
                importlib.import_module(found.name)


def iter_subclasses(root: type[Exception]) -> Iterator[type[Exception]]:
    yield root
    for kind in root.__subclasses__():
        yield from iter_subclasses(kind)


def find_errors() -> list[type[Exception]]:
    import_everything()
    # A test's own subclass is no error of the product.
    found = {kind for root in ROOTS for kind in iter_subclasses(root)}
    names = tuple(package.__name__ for package in PACKAGES)
    ours = [kind for kind in found if kind.__module__.partition(".")[0] in names]
    return sorted(ours, key=lambda kind: (kind.__module__, kind.__name__))


ERRORS = find_errors()


def code_of(kind: type[Exception]) -> str:
    return str(vars(kind).get("code", ""))


def is_retryable(kind: type[Exception]) -> bool:
    return bool(next(vars(base)["retryable"] for base in kind.__mro__ if "retryable" in vars(base)))


def read_rows() -> dict[str, list[str]]:
    return {
        row[0].strip("`"): row for row in iter_rows(read_document("errors.md")) if "`" in row[0]
    }


def test_no_two_errors_share_a_code() -> None:
    counted = Counter(code_of(kind) for kind in ERRORS)

    assert [code for code, count in counted.items() if count > 1] == []


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_has_a_code_and_a_docstring_of_its_own(kind: type[Exception]) -> None:
    assert code_of(kind), f"{kind.__name__} inherits its code: give it one"
    assert vars(kind).get("__doc__"), f"{kind.__name__} has no docstring"
    assert issubclass(kind, ROOTS)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_has_its_row_in_the_document(kind: type[Exception]) -> None:
    row = read_rows().get(code_of(kind))

    assert row is not None, f"docs/errors.md has no row for {code_of(kind)}"
    assert len(row) == 5
    assert row[4] == ("yes" if is_retryable(kind) else "no")


def test_the_document_names_no_code_twice_and_none_that_is_not_there() -> None:
    codes = [row[0].strip("`") for row in iter_rows(read_document("errors.md")) if "`" in row[0]]

    assert [code for code, count in Counter(codes).items() if count > 1] == []
    assert set(codes) == {code_of(kind) for kind in ERRORS} | JOB_REASONS


def test_reasons_of_jobs_are_documented() -> None:
    section = find_section(read_document("errors.md"), "## Reasons of jobs")

    assert {row[0].strip("`") for row in iter_rows(section) if "`" in row[0]} == JOB_REASONS


def iter_reason_codes() -> Iterator[str]:
    """Yield the code of every `Reason("…", …)` in the product's sources."""
    for package in PACKAGES:
        for path in (ROOT / package.__name__).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                is_reason = (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id == "Reason"
                    and node.args
                )
                if not is_reason:
                    continue
                assert isinstance(node, ast.Call)
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    yield str(first.value)


def test_every_reason_written_in_the_code_is_documented() -> None:
    written = set(iter_reason_codes())

    assert written, "no Reason(…) was found: has the class another name now?"
    assert written <= JOB_REASONS | {code_of(kind) for kind in ERRORS}
