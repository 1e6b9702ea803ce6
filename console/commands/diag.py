"""`edgeward diag`: one file for a bug report."""

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    del app
