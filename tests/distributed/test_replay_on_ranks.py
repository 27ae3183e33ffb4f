"""A dump of one layout fails again, for the same rollout, in another."""

import dataclasses
import math
from pathlib import Path

import pytest

from prefixrl_mcore.config.policy import LossConfig, ParallelConfig
from prefixrl_mcore.data.repacking import repack
from prefixrl_mcore.policy.nonfinite import NonFiniteError
from prefixrl_mcore.trainer.dumps import Dump, dump_path, read_dump, write_dump
from prefixrl_mcore.trainer.replay import replay
from tests.support.policies import STREAM_TOKENS, build_policy, make_batch, make_sequences
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import build_tiny_qwen3, write_model_folder

LOSS = LossConfig(importance="truncated")


def replay_on_rank(rank: int, source: Path, dump: Path, parallel: ParallelConfig) -> str:
    policy = build_policy(source, parallel=parallel, loss=LOSS)
    kept = read_dump(dump)
    batch = repack(
        kept.batch,
        stream_tokens=STREAM_TOKENS,
        num_ranks=parallel.data_parallel_size,
        streams_multiple=parallel.microbatch_multiple,
        sequence_multiple=parallel.sequence_multiple,
    )
    failure = replay(policy, Dump(batch=batch, loss=kept.loss))
    assert failure is not None
    (culprit,) = failure.findings.culprits
    assert culprit.sequence_ids == ("rollout-9",)
    return f"{failure.error}: {failure.findings}"


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(
            ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
            id="pp2 vpp2",
        ),
        pytest.param(ParallelConfig(context_parallel_size=2), id="cp2"),
        pytest.param(ParallelConfig(data_parallel_size=2), id="dp2"),
    ],
)
def test_a_dump_of_one_process_fails_again_in_another_layout(
    tmp_path: Path, parallel: ParallelConfig
) -> None:
    source = write_model_folder(build_tiny_qwen3(num_layers=4), tmp_path / "model")
    sequences = make_sequences(15)
    bad = sequences[9]
    logprobs = (math.nan, *bad.rollout_logprobs[1:])
    sequences[9] = dataclasses.replace(bad, rollout_logprobs=logprobs)
    path = dump_path(tmp_path / "dumps", 4)
    write_dump(path, 4, make_batch(sequences), NonFiniteError("loss is nan"), loss=None)
    first, second = run_on_ranks(replay_on_rank, source, path, parallel, world_size=2)
    assert first == second
    assert first.startswith("policy version 0: loss is nan: made by rollout rollout-9 (data-par")
