"""A slow rank is found by the time that it computes, not by the time until all are done."""

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from prefixrl_mcore.config.policy import ParallelConfig
from prefixrl_mcore.observability.phases import Phases
from prefixrl_mcore.records import UpdateResult
from prefixrl_mcore.trainer.step_metrics import rank_metrics
from tests.support.policies import build_policy, make_batch
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import write_tiny_qwen3

DELAY_SECONDS = 0.5


class _SlowPhases(Phases):
    def beat(self) -> None:
        time.sleep(DELAY_SECONDS)


def update_with_a_slow_rank(rank: int, folder: Path) -> tuple[UpdateResult, dict[str, float]]:
    policy = build_policy(folder, parallel=ParallelConfig(data_parallel_size=2))
    policy.update(make_batch(num_ranks=2))  # not the first, which is slow for other reasons
    if rank == 1:
        policy.phases = _SlowPhases()
    batch = make_batch(num_ranks=2)
    assert len(batch.streams) >= 4
    dist.barrier()  # both begin now
    update = policy.update(batch)
    return update, dict(rank_metrics(policy.topology, update))


def test_the_slowest_rank_is_named(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path / "model")
    (fast, metrics), (slow, other_metrics) = run_on_ranks(
        update_with_a_slow_rank, folder, world_size=2
    )
    assert metrics == other_metrics
    assert metrics["balance/slowest_rank"] == 1.0
    assert slow.compute_seconds > 2 * DELAY_SECONDS
    assert fast.compute_seconds < slow.compute_seconds / 2
    mean = (fast.compute_seconds + slow.compute_seconds) / 2
    expected = slow.compute_seconds / mean
    assert metrics["balance/compute_seconds_max_over_mean"] == pytest.approx(expected)
    # Both wait for the gradients, so that the whole pass takes them equally long.
    assert fast.forward_backward_seconds == pytest.approx(slow.forward_backward_seconds, rel=0.3)
    assert fast.forward_backward_seconds > 2 * DELAY_SECONDS
    assert metrics["memory/peak_rss_bytes"] > 1e8
