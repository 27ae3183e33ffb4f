"""A rank for tests of stalls, without torch: ``python -m tests.support.hanging_rank FOLDER HOW
RANK``.

That rank hangs in ``pack``: for good (``sleep``), or in a C call that keeps Python's global lock
(``lock``). The other ranks wait in ``forward_backward``.
"""

import ctypes
import json
import logging
import os
import sys
import time
from pathlib import Path

from prefixrl_mcore.config.operations import PhaseLimitsConfig, StallConfig
from prefixrl_mcore.observability.heartbeat import Heartbeat
from prefixrl_mcore.observability.phases import Phases

LIMIT_SECONDS = 1.5
ANSWER_SECONDS = 3.0
HANG_SECONDS = 120


def hang_in_pack(how: str, beat: Path, hangs: Path) -> None:
    """Be late, once there is a file that tells the others."""
    if how == "lock":
        seen = set[float]()  # twice in this phase: faulthandler is armed after each heartbeat
        while len(seen) < 2:
            time.sleep(0.01)
            last = json.loads(beat.read_text())
            seen |= {last["time"]} if last["phase"] == "pack" else set()
        hangs.touch()
        ctypes.PyDLL(None).sleep(HANG_SECONDS)
    else:
        hangs.touch()
        time.sleep(HANG_SECONDS)


def wait_for_the_others() -> None:
    """Wait as in a collective."""
    time.sleep(HANG_SECONDS)


def main(folder: Path, how: str, hanging: int) -> None:
    """Be one rank of a step."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    phases = Phases()
    config = StallConfig(
        limit_seconds=LIMIT_SECONDS,
        phases=PhaseLimitsConfig(start=60.0, pack=60.0),
        answer_seconds=ANSWER_SECONDS,
        action="stop",
    )
    # All begin together: an interpreter may start seconds after another.
    (folder / f"started-{rank}").touch()
    while not all((folder / f"started-{other}").exists() for other in range(world_size)):
        time.sleep(0.01)
    with Heartbeat(
        folder,
        rank=rank,
        world_size=world_size,
        stage=0,
        phases=phases,
        config=config,
        last_request=0,
    ):
        hangs = folder / "hangs"
        while rank != hanging and not hangs.exists():
            time.sleep(0.01)
        phases.begin_steps()
        phases.begin_step(3)
        with phases.phase("pack"):
            if rank == hanging:
                hang_in_pack(how, folder / f"rank-{rank:05d}.json", hangs)
        with phases.phase("forward_backward"):
            wait_for_the_others()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
