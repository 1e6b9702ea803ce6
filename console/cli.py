"""The `edgeward` command: puts the groups of commands together.

Exit codes are in `console.exits`, the common options in `console.invocation`.
"""

from typing import Annotated

import typer

from console.commands import (
    bench,
    box,
    compare,
    console,
    convert,
    diag,
    explain,
    jobs,
    leases,
    models,
    release,
    rollout,
    services,
    submit,
)
from console.invocation import (
    CommonOptions,
    ConfigOption,
    DataDirOption,
    DeviceOption,
    JsonOption,
)

app = typer.Typer(
    name="edgeward",
    help="An edge AI agent: durable inference and model updates on boxes you cannot walk to.",
    epilog="Exit codes: 0 done, 1 error, 2 usage or settings, 3 not found, 4 broker unavailable, "
    "5 job not as asked, 6 timed out, 7 agent does not run, 8 busy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (services, box, submit, explain, diag, bench, compare, convert):
    group.register(app)
app.add_typer(models.app, name="models")
app.add_typer(release.app, name="release")
app.add_typer(release.keys, name="keys")
app.add_typer(jobs.app, name="jobs")
app.add_typer(leases.app, name="leases")
app.add_typer(console.app, name="console")
app.add_typer(rollout.app, name="rollout")


def _print_version(*, wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        print(f"edgeward {importlib.metadata.version('edgeward')}")
        raise typer.Exit


@app.callback()
def set_common_options(
    context: typer.Context,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            is_eager=True,
            callback=lambda value: _print_version(wanted=value),
        ),
    ] = False,
) -> None:
    """Keep the common options that stand before the command."""
    del version
    context.obj = CommonOptions(config, data_dir, device, as_json)


def main() -> None:
    """Run the command line; ends the process with the command's exit code."""
    app()


if __name__ == "__main__":
    main()
