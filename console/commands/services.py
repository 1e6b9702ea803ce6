"""`edgeward agent`, `worker`, `up` and `demo`: what runs until it is stopped."""

import faulthandler
from typing import TYPE_CHECKING, Annotated

import typer

from agent.jobs import Lane
from console.exits import Exit
from console.invocation import Invocation, command, end_with

if TYPE_CHECKING:
    from console.embedded import MqttBrokerKind

MqttBrokerOption = Annotated[
    str | None,
    typer.Option(metavar="KIND", help="mosquitto or iotcore; by default what is installed."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    command(app, "up")(start_all)
    command(app, "demo")(show_demo)
    command(app, "agent")(serve_agent)
    command(app, "worker")(serve_worker)


def serve_agent(call: Invocation) -> None:
    """Run the agent of this box until SIGTERM or Ctrl-C."""
    _set_up_process(call)
    from agent.daemon.supervisor import run_agent

    run_agent(call.settings)


def serve_worker(
    call: Invocation,
    lane: Annotated[list[Lane], typer.Option(help="A lane to serve; may be repeated.")],
    slot: Annotated[
        str | None, typer.Option(help="This worker's place; unique on the queue broker.")
    ] = None,
) -> None:
    """Run a worker of one or more lanes until SIGTERM or Ctrl-C."""
    _set_up_process(call)
    from worker.app import run_worker

    if run_worker(call.settings, lane, slot):
        end_with(Exit.ERROR)


def _set_up_process(call: Invocation) -> None:
    from agent.logs import set_up_logs

    # SIGABRT, as systemd's watchdog sends it, writes the stacks of all threads.
    faulthandler.enable()
    set_up_logs(call.settings.log_level, as_json=call.settings.log_json)


def start_all(
    call: Invocation,
    mqtt_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port of the MQTT broker; 0 picks a free one."),
    ] = None,
    mqtt_broker: MqttBrokerOption = None,
    http_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port of the HTTP API; 0 picks a free one."),
    ] = None,
) -> None:
    """Start everything on this box: brokers, agent, worker. Ctrl-C stops it all."""
    from agent.logs import set_up_logs
    from console.up import run_up

    flags = {}
    for section, port in (("mqtt", mqtt_port), ("http", http_port)):
        if port is not None:
            flags[section] = {"port": port or _find_free_port()}
    settings = call.load_settings(flags)
    set_up_logs("warning", as_json=settings.log_json)
    run_up(settings, call.options.config, call.out, _read_kind(mqtt_broker))


def show_demo(
    call: Invocation,
    mqtt_broker: MqttBrokerOption = "iotcore",
    keep: Annotated[bool, typer.Option("--keep", help="Leave the folder and its logs.")] = False,
) -> None:
    """Show it all on this box with two real models, in less than a minute."""
    from console.demo import run_demo

    end_with(run_demo(call.out, call.options.data_dir, _read_kind(mqtt_broker), keep=keep))


def _find_free_port() -> int:
    from console.embedded import find_free_port

    return find_free_port()


def _read_kind(name: str | None) -> "MqttBrokerKind | None":
    from console.embedded import MqttBrokerKind

    if name is None:
        return None
    try:
        return MqttBrokerKind(name)
    except ValueError as exc:
        known = ", ".join(MqttBrokerKind)
        msg = f"there is no MQTT broker {name!r}; there are: {known}"
        raise typer.BadParameter(msg, param_hint="--mqtt-broker") from exc
