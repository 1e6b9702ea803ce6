"""`edgeward diag`: one file for a bug report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from console.invocation import Invocation, command
from console.output import build_facts

if TYPE_CHECKING:
    from agent.config import Settings


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "diag")(make_bundle)


def make_bundle(
    call: Invocation,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Else ./edgeward-diag-….tar.gz."),
    ] = None,
    job_ids: Annotated[
        list[str] | None,
        typer.Option("--with-job", metavar="ID", help="Add a job with its input and result."),
    ] = None,
) -> None:
    """Collect what a bug report needs into one file; secrets and your data stay out."""
    from agent.clock import SystemClock, format_ms
    from console.bundle import Bundle
    from console.diagnosis import (
        LEFT_OUT,
        collect_box,
        collect_job,
        collect_machine,
        make_scrubber,
    )

    settings, why = _load(call)
    device = settings.device_id if settings else "unknown"
    at = format_ms(SystemClock().wall_ms())[:19].replace("-", "").replace(":", "")
    name = f"edgeward-diag-{device}-{at}Z"
    bundle = Bundle(name, make_scrubber(settings))
    with call.out.spinner("looking at this box"):
        collect_machine(bundle)
        if settings is None:
            bundle.failed.append({"name": "settings.json", "what": "the box", "error": why})
        else:
            collect_box(settings, bundle, call.options.config, call.options.to_flags())
            for job_id in job_ids or ():
                collect_job(settings, bundle, job_id)
    path = output or Path(f"{name}.tar.gz")
    manifest = bundle.write(path, LEFT_OUT)
    call.out.show({"path": str(path), **manifest}, lambda: _render(path, manifest))


def _load(call: Invocation) -> tuple["Settings | None", str]:
    """Return the settings, or why they cannot be read: a bundle is worth most then."""
    from agent.errors import ConfigError

    try:
        return call.box_settings, ""
    except ConfigError as exc:
        return None, str(exc)


def _render(path: Path, manifest: dict[str, Any]) -> Any:
    return build_facts(
        [
            ("Bundle", path),
            ("In it", "\n".join(f"{item['name']}: {item['what']}" for item in manifest["files"])),
            (
                "Not made",
                "\n".join(f"{item['name']}: {item['error']}" for item in manifest["failed"]),
            ),
            (
                "Left out",
                "\n".join(f"{item['what']}: {item['why']}" for item in manifest["left_out"]),
            ),
            ("", "Look through it before you send it."),
        ]
    )
