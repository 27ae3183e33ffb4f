"""The supervisor ends the server's processes whoever dies first."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from prefixrl_mcore.observability.signal_handlers import handled_by
from prefixrl_mcore.rollout.sglang import supervisor as sglang_supervisor
from tests.support.processes import wait_until_gone

SUPERVISOR = sglang_supervisor.__file__

# A server with one process of its own, both deaf to SIGTERM.
SERVER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, "child"])
time.sleep(120)
"""

# Starts a supervisor in a group of its own and then sleeps, as a trainer would work.
TRAINER = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, sys.argv[1], str(os.getpid()), sys.executable, sys.argv[2]],
                 start_new_session=True)
time.sleep(120)
"""


@pytest.fixture
def server_script(tmp_path: Path) -> Path:
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    return path


def descendants(pid: int, count: int) -> list[int]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pids = [child.pid for child in psutil.Process(pid).children(recursive=True)]
        if len(pids) == count:
            return pids
        time.sleep(0.02)
    raise AssertionError(f"process {pid} did not get {count} descendants")


def start_supervisor(server_script: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, SUPERVISOR, str(os.getpid()), sys.executable, str(server_script)],
        start_new_session=True,
        stderr=subprocess.PIPE,
    )


def test_killed_trainer_takes_the_server_with_it(server_script: Path) -> None:
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, SUPERVISOR, str(server_script)])
    pids = descendants(trainer.pid, 3)

    trainer.kill()
    trainer.wait()

    assert wait_until_gone(pids) == []


def test_sigterm_ends_the_whole_group_though_it_is_deaf(server_script: Path) -> None:
    supervisor = start_supervisor(server_script)
    pids = descendants(supervisor.pid, 2)

    supervisor.send_signal(signal.SIGTERM)
    _, errors = supervisor.communicate(timeout=60)

    assert b"signal SIGTERM" in errors
    assert wait_until_gone(pids) == []


def test_supervisor_hears_signals_before_it_has_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[object] = []

    def start(*_: object, **__: object) -> None:
        heard.extend(signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT))
        raise OSError("no server here")

    monkeypatch.setattr(sys, "argv", ["supervisor.py", str(os.getppid()), "server"])
    monkeypatch.setattr(subprocess, "Popen", start)
    with (
        handled_by(signal.default_int_handler, [signal.SIGTERM, signal.SIGINT]),
        pytest.raises(OSError, match="no server here"),
    ):
        sglang_supervisor.main()
    assert heard == [sglang_supervisor._note_signal] * 2


def test_dead_server_is_reported_and_its_children_are_ended(server_script: Path) -> None:
    supervisor = start_supervisor(server_script)
    pids = descendants(supervisor.pid, 2)

    (server,) = psutil.Process(supervisor.pid).children()
    server.kill()
    _, errors = supervisor.communicate(timeout=60)

    assert b"the server was killed by SIGKILL: out of memory, or killed by hand" in errors
    assert wait_until_gone(pids) == []
