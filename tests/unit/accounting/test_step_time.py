"""Predicted time of a step against FLOPs and bytes worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest

from prefixrl_mcore.accounting.step_time import (
    Assumptions,
    StepTime,
    StepWork,
    estimate_step_time,
)
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import ParallelConfig, PolicyConfig
from tests.support.shapes import SMALL, SMALL_MIXTURE

ASSUMED = Assumptions(peak_flops=1e12, update_efficiency=0.5, rollout_efficiency=0.1)
WORK = StepWork(num_rollouts=64, mean_tokens=512, mean_completion_tokens=256, stream_tokens=1024)
PP, DP, TP = "pipeline_model_parallel_size", "data_parallel_size", "tensor_model_parallel_size"

# SMALL, forward FLOPs per token: attention projections 2 x 24 x 32 x 256, feed-forward
# 2 x 3 x 768 x 256, attention 2 x 512 x 8 x 32; head 2 x 256 x 512 on every second token.
LAYER = 393_216 + 1_179_648 + 262_144
HEAD = 262_144 / 2


def _time(
    parallel: dict[str, Any] | None = None,
    *,
    shape: ModelShape = SMALL,
    work: StepWork = WORK,
    **policy: Any,
) -> StepTime:
    config = PolicyConfig.model_validate({"parallel": parallel or {}} | policy)
    return estimate_step_time(shape, config, work, ASSUMED)


def test_one_rank_computes_forward_and_twice_that_backward() -> None:
    time = _time()
    assert time.compute == pytest.approx(64 * 512 * 3 * (4 * LAYER + HEAD) / 0.5e12)
    assert (time.bubble, time.communication) == (0, 0)


def test_recomputation_runs_the_layers_once_more() -> None:
    extra = _time(recompute="full").compute - _time().compute
    assert extra == pytest.approx(64 * 512 * 4 * LAYER / 0.5e12)


def test_selective_recomputation_runs_the_feed_forward_layers_once_more() -> None:
    extra = _time(recompute="selective").compute - _time().compute
    assert extra == pytest.approx(64 * 512 * 4 * 1_179_648 / 0.5e12)


def test_attention_is_quadratic_in_the_length() -> None:
    longer = StepWork(
        num_rollouts=32, mean_tokens=1024, mean_completion_tokens=512, stream_tokens=1024
    )
    extra = _time(work=longer).compute - _time().compute
    assert extra == pytest.approx(64 * 512 * 3 * 4 * 262_144 / 0.5e12)  # 2 x 512 more keys a token


def test_stages_wait_for_each_other_and_interleaving_halves_that() -> None:
    # 32 microbatches of 1024 tokens; the last stage has two layers and the head.
    microbatch = 1024 * 3 * (2 * LAYER + HEAD) / 0.5e12
    time = _time({PP: 2})
    assert time.compute == pytest.approx(32 * microbatch)
    assert time.bubble == pytest.approx(microbatch)
    interleaved = _time({PP: 2, "virtual_pipeline_model_parallel_size": 2})
    assert interleaved.bubble == pytest.approx(microbatch / 2)


def test_an_uneven_stage_holds_the_others_up() -> None:
    uneven = _time({PP: 2, "num_layers_in_first_pipeline_stage": 3})
    assert uneven.compute == pytest.approx(32 * 1024 * 3 * 3 * LAYER / 0.5e12)


def test_gradients_are_sent_once_a_step() -> None:
    # Parameters: 4 layers of 98 304 + 98 304 + 589 824 + 576, two embeddings, one norm.
    parameters = 4 * (196_608 + 589_824 + 576) + 2 * 131_072 + 256
    plain = _time({DP: 2}).communication
    assert plain == pytest.approx(8 * parameters / 2 / 300e9)
    sharded = _time({DP: 2}, optimizer={"use_distributed_optimizer": True}).communication
    assert sharded == pytest.approx((4 + 2) * parameters / 2 / 300e9)
    assert _time({DP: 16}).communication == pytest.approx(8 * parameters * 15 / 16 / 40e9)


def test_tensor_parallel_ranks_sum_hidden_states_four_times_a_layer() -> None:
    time = _time({TP: 2})
    assert time.compute == pytest.approx(_time().compute / 2)
    # Two all-reduces forward and two backward of 2 bytes x 256, each sends all of it once.
    assert time.communication == pytest.approx(4 * 4 * 64 * 512 * 512 / 300e9)


def test_a_token_meets_its_experts_only() -> None:
    layer = 393_216 + 262_144 + 2 * (2 * 3 * 256 * 256) + 2 * 8 * 256
    time = _time(shape=SMALL_MIXTURE)
    assert time.compute == pytest.approx(64 * 512 * 3 * (4 * layer + HEAD) / 0.5e12)
    many = replace(SMALL_MIXTURE.mixture, num_experts=16)  # pyright: ignore[reportArgumentType]
    assert _time(shape=replace(SMALL_MIXTURE, mixture=many)).compute == pytest.approx(
        time.compute, rel=0.01
    )


def test_sampling_is_a_forward_pass_over_every_token() -> None:
    flops = 64 * 512 * (4 * LAYER + HEAD)
    assert _time({DP: 4}).rollout == pytest.approx(flops / (4 * 0.1e12))


def test_microbatches_hold_whole_sequences() -> None:
    work = replace(WORK, mean_tokens=400.0)  # two fit into 1024
    assert work.num_microbatches(ParallelConfig(data_parallel_size=4)) == 8
    uneven = replace(WORK, num_rollouts=62)
    interleaved = ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    )
    assert uneven.num_microbatches(interleaved) == 32
