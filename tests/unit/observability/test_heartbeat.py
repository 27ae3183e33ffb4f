"""Ranks as threads of one process: who reports, what is no request, what watching outlives."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import pytest

from prefixrl_mcore.config.operations import PhaseLimitsConfig, StallConfig
from prefixrl_mcore.observability.heartbeat import Heartbeat, last_request
from prefixrl_mcore.observability.phases import Phase, Phases
from prefixrl_mcore.observability.stall_report import Beat
from tests.support.waiting import wait_until

CONFIG = StallConfig(
    limit_seconds=0.3, phases=PhaseLimitsConfig(start=None, rollout=600.0), answer_seconds=1.5
)


@contextmanager
def _ranks(
    folder: Path, ranks: Sequence[int], *, world_size: int, before: int = 0, phase: Phase = "other"
) -> Iterator[None]:
    """Let some ranks live, in a phase of step 3."""
    with ExitStack() as stack:
        for rank in ranks:
            phases = Phases()
            phases.begin_steps()
            phases.begin_step(3)
            stack.enter_context(phases.phase(phase))
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
        yield


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
    answered = Beat(
        rank=0,
        host="node",
        pid=1,
        stage=0,
        step="step 3",
        phase="other",
        num_changes=1,
        num_beats=0,
        seconds=0.0,
        time=0.0,
        answers=1,
    )
    (tmp_path / "rank-00000.json").write_text(json.dumps(asdict(answered)))  # and is gone
    start = time.monotonic()
    with _ranks(tmp_path, [1, 2], world_size=3):
        wait_until((tmp_path / "stall-00001.txt").exists)
    assert time.monotonic() - start > 2 * CONFIG.answer_seconds  # rank 0 was waited for


def test_what_lies_in_the_folder_is_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "stall-00007.request").touch()  # of an earlier start
    (tmp_path / "stall-x.request").write_text("?")
    assert last_request(tmp_path) == 7
    assert last_request(tmp_path / "none") == 0
    with _ranks(tmp_path, [0], world_size=2, before=7, phase="rollout"):  # which may last
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

    def is_blocked() -> bool:
        """Put a folder where the file was, unless that is written again just then."""
        beat.unlink()
        with suppress(FileExistsError):
            beat.mkdir()
        return beat.is_dir()

    with _ranks(tmp_path, [0], world_size=1, phase="rollout"):
        wait_until(is_blocked)  # nothing can be written there
        wait_until(lambda: caplog.records)
        time.sleep(0.2)  # for a second one
        beat.rmdir()
        wait_until(beat.is_file)
    (record,) = caplog.records
    assert record.getMessage().startswith("heartbeat of rank 0: IsADirectoryError")
