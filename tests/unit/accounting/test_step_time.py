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
from prefixrl_mcore.data.packing import pack
from prefixrl_mcore.records import TrainingSequence
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


def test_gpus_of_rollout_nodes_sample_instead_of_the_trainers() -> None:
    config = PolicyConfig.model_validate({"parallel": {DP: 2}})
    apart = estimate_step_time(SMALL, config, WORK, replace(ASSUMED, rollout_gpus=8))
    assert apart.rollout == pytest.approx(_time({DP: 2}).rollout / 4)
    assert apart.update == _time({DP: 2}).update
    slow = estimate_step_time(SMALL, config, WORK, replace(ASSUMED, decode_seconds=1e6))
    assert slow.rollout == 1e6


def test_microbatches_hold_whole_sequences() -> None:
    work = replace(WORK, mean_tokens=400.0)  # two fit into 1024
    assert work.num_microbatches(ParallelConfig(data_parallel_size=4)) == 8
    uneven = replace(WORK, num_rollouts=62)
    interleaved = ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    )
    assert uneven.num_microbatches(interleaved) == 32


@pytest.mark.parametrize("group_size", [2, 4])  # a group fits into a stream, or it does not
@pytest.mark.parametrize(
    "parallel",
    [{}, {PP: 8}, {PP: 4, "virtual_pipeline_model_parallel_size": 2}, {DP: 3}, {DP: 32, PP: 2}],
    ids=str,
)
def test_microbatches_and_the_busiest_rank_are_those_of_the_packing(
    parallel: dict[str, int], group_size: int
) -> None:
    layout = ParallelConfig.model_validate(parallel)
    work = replace(WORK, num_rollouts=12, mean_tokens=300.0, group_size=group_size)
    batch = pack(
        [
            TrainingSequence(
                sequence_id=str(index),
                group_index=index // group_size,
                context_token_ids=(1,) * 299,
                completion_token_ids=(1,),
                advantage=1.0,
            )
            for index in range(12)
        ],
        stream_tokens=1024,
        num_ranks=layout.data_parallel_size,
        streams_multiple=layout.microbatch_multiple,
        max_completion_tokens=1,
    )
    ranks = [batch.rank_streams(rank) for rank in range(layout.data_parallel_size)]
    assert work.num_microbatches(layout) == len(ranks[0])
    num_sequences = max(sum(stream.num_rows for stream in streams) for streams in ranks)
    assert work.busiest_tokens(layout) == 300 * num_sequences


def test_ranks_without_a_sequence_make_no_step_shorter() -> None:
    # Sixteen sequences for 64 ranks: sixteen of them have one each, as sixteen ranks would.
    few = replace(WORK, num_rollouts=16)
    assert _time({DP: 64}, work=few).compute == _time({DP: 16}, work=few).compute
    assert _time({DP: 64}, work=few).compute == pytest.approx(512 * 3 * (4 * LAYER + HEAD) / 0.5e12)


def test_a_reference_costs_a_forward_pass_of_every_token() -> None:
    scored = replace(WORK, has_reference=True)
    time = _time(work=scored)
    assert time.reference == pytest.approx(64 * 512 * (4 * LAYER + HEAD) / 0.5e12)
    assert time.total == pytest.approx(_time().total + time.reference)
    assert _time().reference == 0
    # Two stages: 32 microbatches of 1024 tokens, and one more that a stage waits for.
    staged = _time({PP: 2}, work=scored)
    assert staged.reference == pytest.approx(33 * 1024 * (2 * LAYER + HEAD) / 0.5e12)
    # Two all-reduces a layer, where an update has four.
    split = _time({TP: 2}, work=scored)
    assert split.reference - time.reference / 2 == pytest.approx(split.communication / 2)
