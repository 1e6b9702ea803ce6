"""A network of its own for the agent, in which packets get lost: netns, veth and nft.

Owns a network namespace, the pair of interfaces that joins it to this machine, and a table of
the packet filter that drops what passes between the two. Needs root, `ip` and `nft`.

What a proxy cannot do: a lost packet is sent again by TCP, with its back-off, and neither side
learns that the other is gone.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence

_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_LOSSY_PERCENT = 30


def find_obstacle() -> str | None:
    """Return why there can be no wire here, or None."""
    if os.geteuid() != 0:
        return "a network namespace needs root"
    missing = [name for name in ("ip", "nft") if shutil.which(name, path=_PATH) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


class Wire:
    """A cable between this machine and a network namespace. Made at once; `close` removes it."""

    def __init__(self) -> None:
        number = os.getpid() % 64516
        network = f"10.213.{number // 254}.{number % 254 // 4 * 4}"
        head, _, last = network.rpartition(".")
        self.host = f"{head}.{int(last) + 1}"
        """This machine's address on the wire."""
        self._namespace = f"chaos{os.getpid()}"
        self._table = self._namespace
        near, far = f"ch{os.getpid()}", f"cf{os.getpid()}"
        self._near = near
        inside = ("ip", "netns", "exec", self._namespace)
        _run("ip", "netns", "add", self._namespace)
        try:
            _run("ip", "link", "add", near, "type", "veth", "peer", "name", far)
            _run("ip", "link", "set", far, "netns", self._namespace)
            _run("ip", "addr", "add", f"{self.host}/30", "dev", near)
            _run("ip", "link", "set", near, "up")
            _run(*inside, "ip", "addr", "add", f"{head}.{int(last) + 2}/30", "dev", far)
            _run(*inside, "ip", "link", "set", far, "up")
            _run(*inside, "ip", "link", "set", "lo", "up")
        except OSError:
            self.close()
            raise

    def wrap(self, argv: Sequence[str]) -> tuple[str, ...]:
        """Return a command that runs `argv` at the far end, in the same process."""
        program = shutil.which("ip", path=_PATH) or "ip"
        return (program, "netns", "exec", self._namespace, *argv)

    def drop(self, percent: int = 100) -> None:
        """Lose so many of the packets, in both directions, until `mend`."""
        share = "" if percent >= 100 else f"numgen random mod 100 < {percent} "
        self.mend()
        _run(
            "nft",
            f"add table inet {self._table}; "
            f"add chain inet {self._table} in {{ type filter hook input priority 0; }}; "
            f"add chain inet {self._table} out {{ type filter hook output priority 0; }}; "
            f"add rule inet {self._table} in iifname {self._near} {share}drop; "
            f"add rule inet {self._table} out oifname {self._near} {share}drop",
        )

    def drop_some(self) -> None:
        """Lose a third of the packets."""
        self.drop(_LOSSY_PERCENT)

    def mend(self) -> None:
        """Lose nothing any more."""
        # Adding what is there already is no error, and deleting what is not would be one.
        _run("nft", f"add table inet {self._table}; delete table inet {self._table}")

    def close(self) -> None:
        """Remove everything."""
        self.mend()
        # The interfaces go with the namespace.
        _run("ip", "netns", "del", self._namespace)


def _run(*argv: str) -> None:
    """Run a command.

    Raises:
        OSError: it failed; carries what it said.
    """
    program = shutil.which(argv[0], path=_PATH) or argv[0]
    done = subprocess.run((program, *argv[1:]), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        msg = f"{' '.join(argv)}: {done.stderr.strip()}"
        raise OSError(msg)
