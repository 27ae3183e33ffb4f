"""A session packs as the prediction of memory and time takes for granted."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.launch.check import step_work
from prefixrl_mcore.records import TrainingSequence
from prefixrl_mcore.trainer.session import Session
from tests.support.shapes import SMALL


@pytest.mark.parametrize(
    ("virtual", "num_streams"), [(None, 1), (2, 4)], ids=["plain", "interleaved"]
)
def test_few_sequences_need_no_filler_in_a_plain_pipeline(
    virtual: int | None, num_streams: int
) -> None:
    config = RunConfig.model_validate(
        {
            "run_folder": "runs/x",
            "model": {"path": "models/x"},
            "data": {"problems": "x.jsonl"},
            "rollout": {"max_completion_tokens": 40, "max_total_tokens": 60},
            "batch": {"prompts_per_step": 1, "group_size": 2, "stream_tokens": 120},
            "policy": {
                "parallel": {
                    "pipeline_model_parallel_size": 4,
                    "virtual_pipeline_model_parallel_size": virtual,
                }
            },
        }
    )
    session = cast(Any, SimpleNamespace(config=config, policy=SimpleNamespace(shape=SMALL)))
    sequences = [
        TrainingSequence(
            sequence_id=str(index),
            group_index=0,
            context_token_ids=(1,) * 20,
            completion_token_ids=(1,) * 40,
            advantage=1.0,
        )
        for index in range(2)
    ]
    batch = Session.pack_sequences(session, sequences, aggregation="token_mean")
    assert len(batch.streams) == num_streams
    assert step_work(config, None).num_microbatches(config.policy.parallel) == num_streams
