"""Ranks as small scripts: what they are given, how they are stopped, which exit code counts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefixrl_mcore.cli import main
from prefixrl_mcore.launch.local import launch_ranks
from tests.support.processes import is_running
from tests.support.waiting import wait_until

LAUNCHER = """
import sys
from pathlib import Path
from prefixrl_mcore.launch.local import launch_ranks
program = (sys.executable, "-c", sys.argv[2])
sys.exit(launch_ranks(2, [sys.argv[1]], log_folder=Path(sys.argv[1]), program=program))
"""
RANK = """
import os, signal, sys, time
from pathlib import Path
def stop(number, _frame):
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, HANDLER)
Path(sys.argv[1], os.environ["RANK"] + ".part").write_text(str(os.getpid()))
Path(sys.argv[1], os.environ["RANK"] + ".part").rename(sys.argv[1] + "/pid-" + os.environ["RANK"])
while True:
    time.sleep(0.02)
"""


def _launch(folder: Path, script: str, grace_seconds: float = 20.0) -> int:
    program = (
        sys.executable,
        "-c",
        f"import os, sys, time; rank = int(os.environ['RANK']);{script}",
    )
    return launch_ranks(
        2, [str(folder)], log_folder=folder, program=program, grace_seconds=grace_seconds
    )


def _start(folder: Path, handler: str) -> tuple["subprocess.Popen[bytes]", list[int]]:
    """Start a launcher of two ranks; return it and the process ids once both are ready."""
    command = [sys.executable, "-c", LAUNCHER, str(folder), RANK.replace("HANDLER", handler)]
    launcher = subprocess.Popen(command)
    files = [folder / f"pid-{rank}" for rank in range(2)]
    wait_until(lambda: all(file.exists() for file in files))
    return launcher, [int(file.read_text()) for file in files]


def test_ranks_get_what_a_launcher_sets_and_the_arguments(tmp_path: Path) -> None:
    script = "import json; json.dump(dict(os.environ), open(f'{sys.argv[1]}/{rank}.json', 'w'))"
    assert _launch(tmp_path, script) == 0
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (first["RANK"], first["LOCAL_RANK"]) == ("0", "0")
    assert (second["RANK"], second["LOCAL_RANK"]) == ("1", "1")
    for name, value in {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        assert first[name] == second[name] == value
    assert first["MASTER_PORT"] == second["MASTER_PORT"]


def test_only_rank_0_is_heard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _launch(tmp_path, "print('rank', rank); print('error', rank, file=sys.stderr)") == 0
    assert capfd.readouterr() == ("rank 0\n", "error 0\n")
    assert sorted((tmp_path / "rank-1.log").read_text().splitlines()) == ["error 1", "rank 1"]


@pytest.mark.parametrize(
    ("script", "code", "named"),
    [
        ("sys.exit([3, 4][rank])", 3, None),
        ("sys.exit([0, 4][rank])", 4, 1),
        ("sys.exit([1, 2][rank])", 2, 1),
        ("sys.exit([2, 1][rank])", 2, 0),
        ("sys.exit([2, 2][rank])", 2, 0),
        ("os.kill(os.getpid(), 9 if rank else 0)", 137, 1),
        ("sys.exit(76) if rank else os.kill(os.getpid(), 9)", 76, None),
    ],
)
def test_which_exit_code_counts_and_which_rank_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, script: str, code: int, named: int | None
) -> None:
    assert _launch(tmp_path, script) == code
    if named is not None:
        assert ("rank-1.log" in caplog.text) == (named == 1)


def test_ranks_that_hang_after_a_failure_are_ended(tmp_path: Path) -> None:
    started = time.monotonic()
    script = "sys.exit(1) if rank else time.sleep(60)"
    assert _launch(tmp_path, script, grace_seconds=0.3) == 128 + signal.SIGTERM
    assert 0.3 < time.monotonic() - started < 50


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_all_ranks(tmp_path: Path, number: signal.Signals) -> None:
    launcher, pids = _start(tmp_path, "stop")
    launcher.send_signal(number)
    assert launcher.wait(60) == 128 + number
    assert not any(is_running(pid) for pid in pids)


def test_a_second_interrupt_kills(tmp_path: Path) -> None:
    note = 'lambda *_: Path(sys.argv[1], "told-" + os.environ["RANK"]).touch()'
    launcher, pids = _start(tmp_path, note)
    launcher.send_signal(signal.SIGINT)
    # Two signals that are sent before the first is seen are one.
    wait_until(lambda: len(list(tmp_path.glob("told-*"))) == 2)
    assert launcher.poll() is None
    assert all(is_running(pid) for pid in pids)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(60) == 128 + signal.SIGINT
    assert not any(is_running(pid) for pid in pids)


def test_ranks_die_with_the_launcher(tmp_path: Path) -> None:
    launcher, pids = _start(tmp_path, "signal.SIG_IGN")
    assert all(os.getsid(pid) == pid for pid in pids)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(is_running(pid) for pid in pids))


@pytest.mark.parametrize("command", [["train"], ["replay", "--step", "0"]])
def test_a_rank_that_others_have_started_asks_cublas_for_equal_bits_too(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun does not; neither does a user who starts the only rank."""
    name, *flags = command
    (tmp_path / "run.toml").write_text(
        f'run_folder = "{tmp_path}/run"\nmodel.path = "{tmp_path}/none"\n'
        f'data.problems = "{tmp_path}/none.jsonl"\n'
    )
    for given, expected in ((None, ":4096:8"), (":16:8", ":16:8")):
        if given is None:
            monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        else:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
        assert main([name, str(tmp_path / "run.toml"), *flags]) == 2  # there is no model
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected
