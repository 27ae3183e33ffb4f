"""Ranks as threads of one process: who reports, what is no request, what watching outlives."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from prefixrl_mcore.config.operations import PhaseLimitsConfig, StallConfig
from prefixrl_mcore.observability.heartbeat import Heartbeat, last_request
from prefixrl_mcore.observability.phases import Phases
from tests.support.waiting import wait_until

CONFIG = StallConfig(
    limit_seconds=0.3, phases=PhaseLimitsConfig(start=None, rollout=60.0), answer_seconds=0.6
)


@contextmanager
def _ranks(
    folder: Path, ranks: Sequence[int], *, world_size: int, before: int = 0
) -> Iterator[list[Phases]]:
    """Let some ranks live; they begin in ``other`` of step 3."""
    with ExitStack() as stack:
        alive = [Phases() for _ in ranks]
        for rank, phases in zip(ranks, alive, strict=True):
            phases.begin_steps()
            phases.begin_step(3)
            stack.enter_context(
                Heartbeat(
                    folder,
                    rank=rank,
                    world_size=world_size,
                    stage=0,
                    phases=phases,
                    config=CONFIG,
                    last_request=before,
                )
            )
        yield alive


def test_a_silent_rank_0_is_named_alone_in_one_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rank-00000.json").write_text('{"rank": ')  # cannot be read
    with _ranks(tmp_path, [1, 2, 3], world_size=4):
        wait_until((tmp_path / "stall-00001.txt").exists)
    headline, *lines = (tmp_path / "stall-00001.txt").read_text().splitlines()
    assert headline == "stall: rank 0 never gave a sign of life"
    assert lines[0] == "  rank 0: no heartbeat"
    assert sum("did not answer" in line for line in lines) == 0
    reports = [r for r in caplog.records if r.getMessage().startswith("stall:")]
    assert len(reports) == 1


def test_the_next_rank_reports_if_the_lowest_that_answered_dies(tmp_path: Path) -> None:
    with _ranks(tmp_path, [1, 2], world_size=3):
        beat = tmp_path / "rank-00000.json"

        def has_answered() -> bool:
            return (tmp_path / "rank-00001.json").exists() and json.loads(
                (tmp_path / "rank-00001.json").read_text()
            )["answers"] == 1

        wait_until(has_answered)
        answered = json.loads((tmp_path / "rank-00001.json").read_text())
        beat.write_text(json.dumps(answered | {"rank": 0}))  # rank 0 answers and is gone
        start = time.monotonic()
        wait_until((tmp_path / "stall-00001.txt").exists)
    assert time.monotonic() - start > CONFIG.answer_seconds  # rank 0 was waited for


def test_what_lies_in_the_folder_is_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "stall-00007.request").touch()  # of an earlier start
    (tmp_path / "stall-x.request").write_text("?")
    assert last_request(tmp_path) == 7
    assert last_request(tmp_path / "none") == 0
    with (
        _ranks(tmp_path, [0], world_size=2, before=7) as (phases,),
        phases.phase("rollout"),  # may last
    ):
        time.sleep(0.5)
        (tmp_path / "stall-00007.request").unlink()
        time.sleep(0.5)
    assert not list(tmp_path.glob("stall-*.txt"))
    assert not caplog.records
    assert json.loads((tmp_path / "rank-00000.json").read_text())["answers"] == 7


def test_watching_outlives_trouble_and_tells_it_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    beat = tmp_path / "rank-00000.json"
    with _ranks(tmp_path, [0], world_size=1) as (phases,), phases.phase("rollout"):
        wait_until(beat.exists)
        beat.unlink()
        beat.mkdir()  # nothing can be written there
        (beat / "x").touch()
        wait_until(lambda: caplog.records)
        time.sleep(0.2)  # for a second one
        (beat / "x").unlink()
        beat.rmdir()
        wait_until(beat.is_file)
    (record,) = caplog.records
    assert record.getMessage().startswith("heartbeat of rank 0: IsADirectoryError")
