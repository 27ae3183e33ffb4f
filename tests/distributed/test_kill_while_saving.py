"""A rank is killed (SIGKILL) at every stage of a save; the run goes on as if it had not been."""

import os
import resource
import signal
import sys
from pathlib import Path

import pytest
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException

from prefixrl_mcore.checkpoint.manifest import SaveError, verify
from prefixrl_mcore.checkpoint.retention import Retention
from prefixrl_mcore.checkpoint.run_checkpoints import clean_up, latest_checkpoint
from prefixrl_mcore.checkpoint.save_load import load_checkpoint
from prefixrl_mcore.checkpoint.saver import CheckpointSaver
from prefixrl_mcore.config.policy import ParallelConfig
from prefixrl_mcore.policy.topology import run_on_first
from tests.support.policies import build_policy, make_batch, max_difference, weights_of
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import build_tiny_qwen3, write_model_folder

TP2 = ParallelConfig(tensor_model_parallel_size=2)
NUM_STEPS = 3
KILLED_STEP = 2

Stage = tuple[int, str, str]
"""Rank that dies, audit event before which it dies, and part of the path that the event names."""

STAGES = {
    "first file": (0, "open", "trainer.json"),
    "tensors of the first rank": (0, "open", "__0_0.distcp"),
    "tensors of another rank": (1, "open", "__1_0.distcp"),
    "index": (0, "open", ".metadata.tmp"),
    "name of the index": (0, "os.rename", ".metadata.tmp"),
    "manifest": (0, "open", "manifest.json"),
    "name of the checkpoint": (0, "os.rename", ".writing-"),
    "pointer": (0, "open", ".latest.tmp-"),
    "name of the pointer": (0, "os.rename", ".latest.tmp-"),
    "name of the old checkpoint": (0, "os.rename", ".deleting-"),
    "files of the old checkpoint": (0, "shutil.rmtree", ".deleting-"),
}
SEALED = ("pointer", "name of the pointer", "name of the old checkpoint")
FAST = {("tensors of another rank", True), ("pointer", False)}


def die_at(rank: int, stage: Stage) -> None:
    """Kill this process for good when it is about to do what the stage says."""
    victim, wanted, part = stage

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == wanted and any(part in str(argument) for argument in arguments):
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == victim:
        sys.addaudithook(watch)


def train(
    rank: int, source: Path, folder: Path, in_background: bool, stage: Stage | None
) -> tuple[int, dict[str, Tensor]]:
    """Train from the latest checkpoint on; return the first step and the last weights."""
    policy = build_policy(source, parallel=TP2)
    saver = CheckpointSaver(folder, Retention(keep_last=1), in_background=in_background)
    first_step = 0
    run_on_first(lambda: clean_up(folder))
    if run_on_first(lambda: latest_checkpoint(folder)) is not None:
        first_step, _ = load_checkpoint(folder, policy)
    for step in range(first_step, NUM_STEPS):
        policy.update(make_batch())
        saver.finish(wait=True)
        if stage is not None and step + 1 == KILLED_STEP:
            die_at(rank, stage)
        saver.start(step + 1, policy, {})
        if not in_background:
            saver.finish(wait=True)
    saver.finish(wait=True)
    return first_step, weights_of(policy)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(build_tiny_qwen3(), tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed") / "checkpoints"
    return run_on_ranks(train, source, folder, False, None, world_size=2)[0][1]


@pytest.mark.parametrize(
    ("name", "in_background"),
    [
        pytest.param(
            *(name, in_background),
            id=f"{name}, {'in background' if in_background else 'at once'}",
            marks=[] if (name, in_background) in FAST else pytest.mark.slow,
        )
        for name in STAGES
        for in_background in (False, True)
    ],
)
def test_a_run_killed_at_any_stage_of_a_save_goes_on_exactly(
    source: Path,
    undisturbed: dict[str, Tensor],
    tmp_path: Path,
    name: str,
    in_background: bool,
) -> None:
    folder = tmp_path / "checkpoints"
    with pytest.raises(ProcessException):
        run_on_ranks(train, source, folder, in_background, STAGES[name], world_size=2)
    is_sealed = name in (*SEALED, "files of the old checkpoint")
    latest = latest_checkpoint(folder)
    assert latest == folder / f"step-{KILLED_STEP if is_sealed else KILLED_STEP - 1:06d}"
    verify(latest)

    results = run_on_ranks(train, source, folder, in_background, None, world_size=2)
    for first_step, weights in results:
        assert first_step == (KILLED_STEP if is_sealed else KILLED_STEP - 1)
        assert max_difference(weights, undisturbed) == 0.0
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000003"]


def fill_the_disk_of_one_rank(
    rank: int, source: Path, folder: Path, in_background: bool
) -> tuple[str, list[str], list[str]]:
    policy = build_policy(source, parallel=TP2)
    saver = CheckpointSaver(folder, Retention(keep_last=1), in_background=in_background)
    saver.start(1, policy, {})
    saver.finish(wait=True)
    policy.update(make_batch())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    message = "none"
    try:
        saver.start(2, policy, {})
        saver.finish(wait=True)
    except SaveError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after_failure = run_on_first(lambda: sorted(path.name for path in folder.iterdir()))
    saver.start(2, policy, {})
    saver.finish(wait=True)
    return message, after_failure, sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "in_background", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["background", "once"]
)
def test_every_rank_learns_that_the_storage_of_one_refused(
    source: Path, tmp_path: Path, in_background: bool
) -> None:
    folder = tmp_path / "checkpoints"
    results = run_on_ranks(fill_the_disk_of_one_rank, source, folder, in_background, world_size=2)
    for message, after_failure, after_retry in results:
        assert "rank 1: OSError: [Errno 27] File too large" in message
        assert "rank 0" not in message
        assert after_failure == ["latest", "step-000001"]
        assert after_retry == ["latest", "step-000002"]
