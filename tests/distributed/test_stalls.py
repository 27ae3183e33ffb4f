"""A rank hangs; all ranks' phases and stacks are told, and the late one is named."""

import logging
import re
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.config.operations import StallConfig
from prefixrl_mcore.launch.local import launch_ranks
from prefixrl_mcore.observability.heartbeat import Heartbeat
from prefixrl_mcore.observability.phases import Phases
from tests.support.hanging_rank import HANG_SECONDS
from tests.support.ranks import run_on_ranks

LIMIT_SECONDS = 2.0
LATE_SECONDS = 6.0
"""Between twice the limit, when there is a second report, and four times, when there is a third."""


def be_late_once(rank: int, folder: Path) -> list[str]:
    """Take a step in which rank 1 is late; return what was logged."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("prefixrl_mcore.observability.heartbeat").addHandler(handler)
    phases = Phases()
    config = StallConfig(limit_seconds=LIMIT_SECONDS)
    dist.barrier()
    with Heartbeat(
        folder,
        rank=rank,
        world_size=2,
        stage=0,
        phases=phases,
        config=config,
        last_request=0,
    ):
        phases.begin_steps()
        for step in (2, 3):
            phases.begin_step(step)
            with phases.phase("pack"):
                time.sleep(LATE_SECONDS if (rank, step) == (1, 3) else 0.0)
            with phases.phase("forward_backward"):
                dist.barrier()
        dist.barrier()
        time.sleep(1.0)
    return records


def test_a_late_rank_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    first, second = run_on_ranks(be_late_once, tmp_path, world_size=2)
    reports = [text for text in first if text.startswith("stall:")]
    assert 1 <= len(reports) <= 2  # the second when twice the limit has passed
    headline, *lines = reports[0].splitlines()
    assert headline.startswith("stall: rank 1 late in phase pack of step 3, no progress for ")
    assert headline.endswith("(limit 2 s)")
    assert "forward_backward of step 3" in lines[0]
    assert "in a collective" in lines[0]
    assert "in be_late_once <- late" in lines[1]
    assert any("in barrier" in line for line in lines)
    files = sorted(tmp_path.glob("stall-*.txt"))
    assert [path.read_text().rstrip() for path in files] == reports
    assert not any(text.startswith("stall:") for text in second)
    (text,) = (text for text in second if "goes on after" in text)
    assert re.fullmatch(r"rank 1 goes on after \d+ s without progress in pack", text)


@pytest.mark.parametrize(("how", "hanging"), [("sleep", 1), ("lock", 1), ("lock", 0)])
def test_a_hanging_run_is_stopped_with_everybodys_stack(
    how: str, hanging: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    code = launch_ranks(
        3,
        [str(tmp_path), how, str(hanging)],
        log_folder=tmp_path,
        program=[sys.executable, "-m", "tests.support.hanging_rank"],
        grace_seconds=4.0,
    )
    assert code == exit_codes.STALLED
    assert time.monotonic() - start < HANG_SECONDS / 2
    (file,) = tmp_path.glob("stall-*.txt")
    report = file.read_text()
    if hanging:  # rank 0 wrote it
        assert report in capfd.readouterr().err
    said = {
        "sleep": f"stall: rank {hanging} late in phase pack of step 3, no progress for ",
        "lock": f"stall: rank {hanging} without a sign of life for ",
    }
    assert report.startswith(said[how])
    assert ("last seen in phase pack of step 3: the process or its machine is" in report) == (
        how == "lock"
    )
    assert "in hang_in_pack" in report
    assert report.count("in wait_for_the_others") >= 2  # the stack, and where each rank is
    waiting = ", ".join(str(rank) for rank in range(3) if rank != hanging)
    assert f"stack of rank {waiting}, innermost call first:" in report


def test_ranks_that_go_on_are_not_reported(tmp_path: Path) -> None:
    phases = Phases()
    config = StallConfig(limit_seconds=1.2)
    with Heartbeat(
        tmp_path,
        rank=0,
        world_size=1,
        stage=0,
        phases=phases,
        config=config,
        last_request=0,
    ):
        phases.begin_steps()
        with phases.phase("forward_backward"):
            for _ in range(16):
                time.sleep(0.1)
                phases.beat()
        with phases.phase("rollout"):  # may take 7200 s
            time.sleep(1.6)
    assert not list(tmp_path.glob("stall-*"))
    assert (tmp_path / "rank-00000.json").exists()
