"""Run a program that the kernel kills when the process that started it dies.

Owns one thing: asking Linux for the parent-death signal between fork and exec. A
`preexec_fn` could ask as well, but runs Python between fork and exec of a process with
threads, where it can deadlock; a fresh interpreter that execs has no such state.

Run by its path and with the standard library only, so that it starts in some 20 ms:
`python -I -S tether.py PARENT_PID PROGRAM [ARGUMENT ...]`

Source: prctl(2), PR_SET_PDEATHSIG. It is bound to the *thread* that forked, is kept over
exec, and does not exist on macOS, where a child of a killed supervisor lives on.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_EXIT_NOT_FOUND = 127
"""What a shell answers for a program that cannot be run."""


def main(argv: list[str]) -> int:
    """Replace this process by the program in `argv`; return only where that fails."""
    parent_pid, program = int(argv[1]), argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # The parent may have died before the kernel was told to watch it.
        if os.getppid() != parent_pid:
            return 1
    try:
        os.execvp(program[0], program)
    except OSError as exc:
        print(f"cannot run {program[0]}: {exc.strerror}", file=sys.stderr)
    return _EXIT_NOT_FOUND


if __name__ == "__main__":
    sys.exit(main(sys.argv))
