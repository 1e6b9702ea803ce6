"""What a command writes: tables for people, or one JSON document for scripts.

Owns standard output and the wording of errors. With `--json` standard output holds
exactly one JSON document, an error included; progress and notes go to standard error,
and only where a person watches.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text

_PIPE_WIDTH = 160
"""Columns of a table that goes to a file or a pipe, so that no id is cut."""
_STATE_COLOURS = {
    "succeeded": "green",
    "running": "cyan",
    "queued": "blue",
    "canceled": "yellow",
    "expired": "yellow",
}


class Output:
    """Standard output and standard error of one command."""

    def __init__(self, *, as_json: bool) -> None:
        """Take the form that was asked for."""
        self.as_json = as_json

    @property
    def is_watched(self) -> bool:
        """Say whether a person sees progress as it happens."""
        return not self.as_json and sys.stderr.isatty()

    def show(self, document: Any, render: Callable[[], "RenderableType"]) -> None:
        """Write the document as JSON, or what `render` makes of it for people."""
        if self.as_json:
            print(json.dumps(document, indent=2, ensure_ascii=False, default=str), flush=True)
            return
        self.write(render())

    def write(self, renderable: "RenderableType") -> None:
        """Write something for people; nothing with `--json`."""
        if not self.as_json:
            from rich.console import Console

            width = None if sys.stdout.isatty() else _PIPE_WIDTH
            Console(file=sys.stdout, width=width, highlight=False).print(renderable)

    def note(self, text: str) -> None:
        """Write a line for people to standard error; nothing with `--json`."""
        if not self.as_json:
            print(text, file=sys.stderr, flush=True)

    def fail(self, code: str, message: str) -> None:
        """Write an error in the form that was asked for."""
        if self.as_json:
            print(json.dumps({"error": {"code": code, "message": message}}, ensure_ascii=False))
        else:
            label = "\x1b[1;31merror:\x1b[0m" if sys.stderr.isatty() else "error:"
            print(f"{label} {message} [{code}]", file=sys.stderr)

    def progress(self, unit: str) -> "AbstractContextManager[Progress | None]":
        """Return a bar for something that takes long, or nothing where nobody watches."""
        if not self.is_watched:
            return nullcontext(None)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn(f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}"),
            TimeElapsedColumn(),
            console=Console(file=sys.stderr),
            transient=True,
        )

    def spinner(self, text: str) -> AbstractContextManager[Any]:
        """Return a sign of life for something without a known length."""
        if not self.is_watched:
            return nullcontext(None)
        from rich.console import Console

        return Console(file=sys.stderr).status(text)


def build_table(headers: Iterable[str], rows: Iterable[Sequence[object]]) -> "Table":
    """Return a plain table; a cell that is no renderable is shown as text, without markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        # An id in two pieces cannot be copied.
        table.add_column(header, overflow="fold", no_wrap=header == "Job")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(_plain(cell)) for cell in row))
    return table


def build_facts(rows: Iterable[tuple[str, object]]) -> "Table":
    """Return a two-column list of names and values."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        shown = value if isinstance(value, Text) else Text(_plain(value))
        table.add_row(Text(name, style="bold"), shown)
    return table


def colour_state(state: str) -> "Text":
    """Return a job's state in its colour."""
    from rich.text import Text

    return Text(state, style=_STATE_COLOURS.get(state, "red"))


def _plain(value: object) -> str:
    return "–" if value is None or value == "" else str(value)
