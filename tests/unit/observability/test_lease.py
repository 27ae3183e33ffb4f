"""One trainer per run folder, on one host and on several."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.observability.lease import Lease
from tests.support.waiting import beside, wait_until

QUICK = {"renewal_seconds": 0.05, "stale_seconds": 0.4}


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_second_trainer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    file = tmp_path / "run" / "lease.json"
    with Lease(file):
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* writes to this run"):
            Lease(file).__enter__()
        assert file.exists()
    assert not file.exists()
    with Lease(file):
        pass


@pytest.mark.parametrize("is_number_taken", [False, True], ids=["dead", "number taken again"])
def test_a_lease_of_a_killed_process_of_this_host_is_stale_at_once(
    tmp_path: Path, is_number_taken: bool
) -> None:
    file = tmp_path / "lease.json"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with Lease(file):
        text = file.read_text()
    file.write_text(text)
    rewrite(file, token="other", process_start="1")
    if not is_number_taken:
        rewrite(file, pid=dead.pid)
    begin = time.monotonic()
    with Lease(file):
        assert time.monotonic() - begin < 30.0  # an other host's would take a minute


def test_another_hosts_lease_is_respected_as_long_as_it_is_renewed(tmp_path: Path) -> None:
    file = tmp_path / "lease.json"
    with Lease(file):
        text = file.read_text()
    file.write_text(text)
    rewrite(file, host="elsewhere", token="other")

    def renew(is_over: threading.Event) -> None:
        while not is_over.wait(0.05):
            os.utime(file)

    patient = {"renewal_seconds": 0.05, "stale_seconds": 20.0}
    with (
        beside(renew),
        pytest.raises(ConfigError, match="on elsewhere writes to this run folder"),
    ):
        Lease(file, **patient).__enter__()
    begin = time.monotonic()
    with Lease(file, **QUICK):  # silent now
        assert time.monotonic() - begin >= 0.4
        assert json.loads(file.read_text())["host"] != "elsewhere"


@pytest.fixture
def lost(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """The lease of start 0 of Slurm job 7, whose process lives, on this host."""
    file = tmp_path / "lease.json"
    with Lease(file):
        text = file.read_text()
    file.write_text(text)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        start = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        rewrite(file, pid=process.pid, process_start=start, token="other", slurm_job="7")
        yield file, process
        process.kill()


@pytest.mark.parametrize("host", [socket.gethostname(), "elsewhere"])
def test_a_later_start_of_a_slurm_job_waits_for_the_end_of_the_one_that_slurm_has_lost(
    lost: tuple[Path, subprocess.Popen[bytes]], host: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    file, process = lost
    rewrite(file, host=host)
    said = f"process {process.pid} on {host}, an earlier start of this Slurm job, still writes"

    def write_on_until_it_is_waited_for(is_over: threading.Event) -> None:
        while said not in caplog.text and not is_over.wait(0.02):
            os.utime(file)
        process.kill()
        process.wait()

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    patient = {"renewal_seconds": 0.05, "stale_seconds": 3.0}
    with beside(write_on_until_it_is_waited_for), Lease(file, **patient):
        assert process.poll() is not None
        assert json.loads(file.read_text())["slurm_start"] == 1
    assert caplog.text.count(said) == 1


@pytest.mark.parametrize(
    ("job", "start"),
    [("7", "1"), ("7", "0"), ("8", "1"), (None, None)],
    ids=["a lost start that does not end", "same start", "another job", "no Slurm"],
)
def test_a_trainer_that_goes_on_is_refused_whatever_slurm_says(
    lost: tuple[Path, subprocess.Popen[bytes]], job: str | None, start: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file, process = lost
    if job is not None and start is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", start)
    seconds = 0.3 if (job, start) == ("7", "1") else 600.0  # only the first one is waited for
    with pytest.raises(ConfigError, match=f"process {process.pid} on .* writes to this run"):
        Lease(file, **QUICK, lost_start_seconds=seconds).__enter__()
    assert json.loads(file.read_text())["token"] == "other"


def test_a_lease_is_renewed_and_one_that_was_taken_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "lease.json"
    with Lease(file, **QUICK):
        first = file.stat().st_mtime_ns
        wait_until(lambda: file.stat().st_mtime_ns > first)
        theirs = json.dumps(json.loads(file.read_text()) | {"token": "other"})

        def is_noticed() -> bool:
            (tmp_path / "theirs").write_text(theirs)
            (tmp_path / "theirs").replace(file)  # again: a renewal may just have been under way
            return "another trainer took this run folder" in caplog.text

        wait_until(is_noticed)
    assert json.loads(file.read_text())["token"] == "other"
