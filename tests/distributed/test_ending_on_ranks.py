"""The end of a run: no rank leaves while rank 0 still uploads metrics."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prefixrl_mcore.observability.run_folder import RunFolder
from prefixrl_mcore.trainer.run import end_together
from tests.support.ranks import run_on_ranks


def _end(rank: int, folder: Path) -> tuple[float, list[float]]:
    closed: list[float] = []

    def close() -> None:
        time.sleep(2)
        closed.append(time.time())

    metrics = SimpleNamespace(close=close) if rank == 0 else None
    session: Any = SimpleNamespace(folder=RunFolder(folder), metrics=metrics)
    end_together(session, seconds=3.0)
    return time.time(), closed


def test_ranks_wait_until_the_metrics_are_closed(tmp_path: Path) -> None:
    (_, (closed,)), (left, none) = run_on_ranks(_end, tmp_path, world_size=2)
    assert none == []
    assert left >= closed
