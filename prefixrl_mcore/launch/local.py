"""Starting the trainer's ranks on this machine: one process each, ended together. Linux only.

Every rank is the leader of a session of its own, so that Ctrl-C in a terminal reaches the launcher
alone, which passes it on. Rank 0 writes to the launcher's output; the output of rank ``n`` goes to
``rank-<n>.log``, so that an error that all ranks meet is shown once.
"""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.observability.signal_handlers import handled_by

logger = logging.getLogger(__name__)

_PROGRAM = (sys.executable, "-m", "prefixrl_mcore.cli")
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
EQUAL_BITS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""What cuBLAS needs to give equal bits in equal runs; it is read with the first use of a GPU."""

RANK_DEFAULTS = {
    "OMP_NUM_THREADS": "1",  # ranks share the cores
    **EQUAL_BITS,
}
"""What a rank runs with unless the user says otherwise."""

_POLL_SECONDS = 0.05
_TERM_SECONDS = 5.0


def launch_ranks(
    world_size: int,
    arguments: Sequence[str],
    *,
    log_folder: Path,
    program: Sequence[str] = _PROGRAM,
    grace_seconds: float = 20.0,
) -> int:
    """Run ``prefixrl ARGUMENTS`` in ``world_size`` ranks of this machine; return the exit code.

    SIGTERM, SIGINT and SIGUSR1 are passed on to all ranks, which stop in their own way; a second
    SIGINT kills them. When a rank fails the others get ``grace_seconds`` to end by themselves,
    then SIGTERM, then SIGKILL. The ranks are killed when the thread that called this dies; it must
    be the main thread.

    Args:
        world_size: number of ranks.
        arguments: what follows ``prefixrl`` on the command line.
        log_folder: the output of all ranks but the first is appended to ``rank-<n>.log`` in it.
        program: the command that ``arguments`` are given to.
        grace_seconds: how long ranks may go on after another one has failed.

    Returns:
        2 (bad input) if any rank returned it, else 76 (stalled) if any did, because the rank that
        hangs has to be killed, else rank 0's exit code, else the first that is not 0; ``128 + n``
        for a rank that died of signal ``n``.
    """
    with _noted_signals() as received:
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            _start(ranks, world_size, [*program, *arguments], log_folder)
            failed = _wait(ranks, received, grace_seconds)
        finally:
            _kill(ranks)
    codes = [_exit_code(rank) for rank in ranks]
    _report(codes, failed, log_folder)
    if received.count(signal.SIGINT) > 1:
        return 128 + signal.SIGINT
    for code in (exit_codes.BAD_INPUT, exit_codes.STALLED):
        if code in codes:
            return code
    return next((code for code in codes if code != 0), 0)


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Collect the signals to pass on in the list that is given, instead of dying of them."""
    received: list[int] = []
    with handled_by(lambda number, _frame: received.append(number), _FORWARDED):
        yield received


def _start(
    ranks: list[subprocess.Popen[bytes]], world_size: int, command: list[str], log_folder: Path
) -> None:
    """Start all ranks, appending each to ``ranks`` at once, so that the caller can end them."""
    log_folder.mkdir(parents=True, exist_ok=True)
    port = str(_free_port())
    for rank in range(world_size):
        environment = {
            **RANK_DEFAULTS,
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        with open(os.devnull if rank == 0 else _log_file(log_folder, rank), "ab") as log:
            ranks.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=None if rank == 0 else log,
                    stderr=None if rank == 0 else log,
                    start_new_session=True,
                    preexec_fn=_die_with(os.getpid()),
                )
            )


def _log_file(log_folder: Path, rank: int) -> Path:
    """Return where the output of a rank other than 0 goes."""
    return log_folder / f"rank-{rank}.log"


def _free_port() -> int:
    """Return a port that nobody listened on a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _die_with(launcher_pid: int) -> Callable[[], None]:
    """Return what a child runs before its program, to be killed when the launcher dies."""
    prctl = ctypes.CDLL(None).prctl  # looked up here: little is safe after a fork

    def set_death_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher_pid:  # it died before the line above
            os._exit(1)

    return set_death_signal


def _wait(
    ranks: list[subprocess.Popen[bytes]], received: list[int], grace_seconds: float
) -> int | None:
    """Wait for all ranks, passing signals on; return the rank that failed first, if any did."""
    num_forwarded = 0
    failed: int | None = None
    end_at = float("inf")
    while any(rank.poll() is None for rank in ranks):
        for number in received[num_forwarded:]:
            num_forwarded += 1
            if received[:num_forwarded].count(signal.SIGINT) > 1:
                return failed
            _send(ranks, number)
        if failed is None and (failed := _first_failed(ranks, received)) is not None:
            end_at = time.monotonic() + grace_seconds
        if time.monotonic() > end_at:
            _terminate(ranks)
            return failed
        time.sleep(_POLL_SECONDS)
    return _first_failed(ranks, received) if failed is None else failed


def _first_failed(ranks: list[subprocess.Popen[bytes]], received: list[int]) -> int | None:
    """Return the lowest rank that ended neither well nor because it was asked to stop."""
    good = {None, 0, exit_codes.TIME_LIMIT, *(128 + number for number in received)}
    return next((index for index, rank in enumerate(ranks) if rank.poll() not in good), None)


def _send(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    """Send a signal to the ranks that still run."""
    for rank in ranks:
        rank.send_signal(number)


def _terminate(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Ask the ranks that are left to end, and give them a moment."""
    _send(ranks, signal.SIGTERM)
    deadline = time.monotonic() + _TERM_SECONDS
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Kill what still runs, each rank with its process group."""
    for rank in ranks:
        if rank.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()


def _exit_code(rank: subprocess.Popen[bytes]) -> int:
    """Return the exit code of a rank that has ended, as a shell gives it."""
    return rank.returncode if rank.returncode >= 0 else 128 - rank.returncode


def _report(codes: list[int], failed: int | None, log_folder: Path) -> None:
    """Name the rank that made the run fail, unless it was rank 0, whose output was seen."""
    if exit_codes.BAD_INPUT in codes:
        failed = codes.index(exit_codes.BAD_INPUT)
    if failed:
        logger.error(
            "rank %d failed with exit code %d; its output is in %s",
            *(failed, codes[failed], _log_file(log_folder, failed)),
        )
