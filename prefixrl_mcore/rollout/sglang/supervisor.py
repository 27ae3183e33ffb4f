"""The parent of a SGLang server: ends it when the trainer is gone. Standard library only.

It is run as a script by SGLang's interpreter, as the leader of a process group of its own that
holds all of the server's processes:

    python supervisor.py <process id of the trainer> <command of the server...>

The trainer is watched by process id and not through PR_SET_PDEATHSIG alone, because that signal
is sent when the *thread* that started the server ends.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 2.0


def main() -> int:
    """Run the server until it ends, a signal comes, or the trainer is gone."""
    trainer_pid = int(sys.argv[1])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note_signal)  # before there is a server to leave behind
    # Children inherit the group; the handlers of the server's own are set by itself.
    server = subprocess.Popen(sys.argv[2:], preexec_fn=_die_with_supervisor)
    cause = ""
    while not cause:
        if server.poll() is not None:
            cause = f"the server {describe_exit(server.returncode)}"
        elif os.getppid() != trainer_pid:
            cause = f"process {trainer_pid}, which started the server, is gone"
        elif _signals:
            cause = f"signal {signal.Signals(_signals[0]).name}"
        else:
            time.sleep(_POLL_SECONDS)
    sys.stderr.write(f"supervisor: {cause}; ending all processes of the server\n")
    sys.stderr.flush()
    _end_group(server)
    return 0


def describe_exit(return_code: int) -> str:
    """Say how a process ended; nobody but the kernel or a person kills one with SIGKILL."""
    if return_code >= 0:
        return f"ended with exit code {return_code}"
    name = signal.Signals(-return_code).name
    hint = ": out of memory, or killed by hand" if -return_code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


_signals: list[int] = []


def _note_signal(number: int, _frame: object) -> None:
    _signals.append(number)


def _die_with_supervisor() -> None:
    """In the server: be killed when the supervisor dies; it has one thread only."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_group(server: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to end, wait a little, then kill it, the supervisor included."""
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
