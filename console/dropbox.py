"""Commands without MQTT: a file in the inbox's `_commands`, which the agent takes.

Owns the writing of such a file, in one step, so that the agent never reads half of one.
"""

from agent.config import Settings
from agent.errors import ConfigError
from agent.fileio import write_atomic
from console.submission import Command

COMMANDS = "_commands"
"""The agent's `agent.daemon.inbox.COMMANDS`, whose import brings the daemon with it."""


def drop_command(settings: Settings, command: Command) -> None:
    """Leave a command for the agent of this box.

    Raises:
        ConfigError: this box watches no inbox.
        OSError: the folder cannot be written.
    """
    if not settings.inbox.enabled:
        msg = "inbox.enabled is false, so the agent takes no local commands: use MQTT"
        raise ConfigError(msg)
    folder = settings.inbox_dir / COMMANDS
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{command.job_id}.json", command.payload)
