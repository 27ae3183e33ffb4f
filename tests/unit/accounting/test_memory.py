"""Predicted memory against numbers worked out by hand; ``test_memory_on_ranks`` measures it."""

from typing import Any

import pytest

from prefixrl_mcore.accounting.activations import LayerShape, kept_bytes
from prefixrl_mcore.accounting.memory import (
    StageMemory,
    Workload,
    estimate_stages,
    in_flight_chunks,
)
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import ParallelConfig, PolicyConfig, RecomputeModule
from tests.support.shapes import LLAMA_3_8B, QWEN3_30B_A3B, SMALL, SMALL_MIXTURE

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
CP, EP, DP = "context_parallel_size", "expert_model_parallel_size", "data_parallel_size"
VPP, SP = "virtual_pipeline_model_parallel_size", "sequence_parallel"


def _layer(shape: ModelShape, parallel: dict[str, Any] | None = None, **changes: Any) -> float:
    settings: dict[str, Any] = {"width": 2, "device": "cuda", "slots_per_token": 1.0} | changes
    return kept_bytes(
        LayerShape(shape=shape, parallel=ParallelConfig(**parallel or {}), **settings)
    )


def _stages(
    parallel: dict[str, Any] | None = None,
    *,
    shape: ModelShape = SMALL,
    num_microbatches: int = 8,
    **policy: Any,
) -> tuple[StageMemory, ...]:
    config = PolicyConfig.model_validate({"parallel": parallel or {}} | policy)
    workload = Workload(
        stream_tokens=1024, stream_rows=512, num_microbatches=num_microbatches, slots_per_token=1.0
    )
    return estimate_stages(shape, config, workload)


# SMALL in bfloat16 on a GPU, bytes per token. Norms 2 (2 x 256 + 4), their outputs 2 x 2 x 256;
# cosines, sines and output 2 (4 + 8) 32; norms of heads 2 (16 x 32 + 8 x 32) + 4 x 12.
FIXED = 1032 + 1024 + 768 + 1584
SLOTS = 2 * (16 + 8) * 32 + 4 * 8
FEED_FORWARD = 5 * 2 * 768
LAYER = FIXED + SLOTS + FEED_FORWARD


def test_what_a_dense_layer_keeps() -> None:
    assert _layer(SMALL) == LAYER == 13_656


def test_padded_attention_keeps_more_slots() -> None:
    assert _layer(SMALL, slots_per_token=1.25) == LAYER + SLOTS / 4


def test_without_norms_of_heads_the_projection_is_not_kept() -> None:
    # Norms 2 (2 x 4096 + 4), outputs 4 x 4096, 2 (4 + 32) 128, slots 2 (64 + 16) 128 + 4 x 32,
    # 10 x 14336.
    assert _layer(LLAMA_3_8B) == 16_392 + 16_384 + 9_216 + 20_608 + 143_360


def test_sequence_parallelism_shards_norms_besides_heads_and_feed_forward() -> None:
    halves = (768 - 2 * 4 * 32) / 2 + 2 * 4 * 32 + 1584 / 2 + SLOTS / 2 + FEED_FORWARD / 2
    assert _layer(SMALL, {TP: 2}) == 1032 + 1024 + halves
    assert _layer(SMALL, {TP: 2, SP: True}) == (1032 + 1024) / 2 + halves


def test_context_parallel_ranks_keep_all_keys_and_values() -> None:
    gathered = 2 * (16 + 4 * 8) * 32 + 4 * 8
    assert _layer(SMALL, {CP: 4}) == FIXED + gathered + FEED_FORWARD


def test_a_mixture_keeps_its_routed_copies() -> None:
    # Two copies of 2 x 256 with 6 x 2 x 256 and 40 bytes each; 5 bytes for each of 8 experts.
    copies = 2 * (512 + 3072 + 40) + 5 * 8
    assert _layer(SMALL_MIXTURE) == FIXED + SLOTS + copies
    spread = {TP: 2, SP: True, EP: 2}
    without = _layer(SMALL, {TP: 2, SP: True}) - FEED_FORWARD / 2
    assert _layer(SMALL_MIXTURE, spread) == without + copies / 2


def test_cut_experts_meet_every_copy_with_a_part_of_their_width() -> None:
    cut = {DP: 2, "expert_tensor_parallel_size": 2}
    # Twice the copies, of 2 x 256 with 6 x 2 x 128 and 40 bytes.
    assert _layer(SMALL_MIXTURE, cut) == FIXED + SLOTS + 2 * 2 * (512 + 1536 + 40) + 40


@pytest.mark.parametrize(
    ("modules", "dropped"),
    [
        (("mlp",), FEED_FORWARD),
        (("layernorm",), 1024),
        # The output and the sums; queries, keys and values stay.
        (("core_attn",), 2 * 8 * 32 + 4 * 8),
    ],
)
def test_selective_recomputation_drops_its_modules(
    modules: tuple[RecomputeModule, ...], dropped: int
) -> None:
    assert _layer(SMALL, recomputed=modules) == LAYER - dropped
    (plain,) = _stages()
    (selective,) = _stages(recompute="selective", recompute_modules=modules)
    assert plain.activations - selective.activations == 4 * 1024 * dropped
    assert selective.backward - plain.backward == 1024 * dropped


def test_other_types_of_state_take_their_bytes_and_offloaded_ones_none() -> None:
    aware = {"use_distributed_optimizer": True, "use_precision_aware_optimizer": True}
    (plain,) = _stages()
    types = {"main_params_dtype": "float16", "exp_avg_dtype": "bfloat16"}
    (small,) = _stages(optimizer=aware | types | {"exp_avg_sq_dtype": "float8"})
    assert small.optimizer == plain.weights / 2 * (2 + 2 + 1)
    assert small.optimizer_step == 0
    (offloaded,) = _stages(optimizer=aware | {"cpu_offload": True, "cpu_offload_fraction": 0.75})
    assert offloaded.optimizer == plain.optimizer / 4


def test_a_cpu_keeps_two_float32_copies_at_each_norm() -> None:
    cpu = _layer(SMALL, device="cpu")
    # At norms 2 x (8 x 256 + 4) for 1032; at heads 8 (8 + 4) 32 + 48 for 1584.
    assert cpu - LAYER == (2 * 2052 - 1032) + (3072 + 48 - 1584)


@pytest.mark.parametrize(
    ("parallel", "num_microbatches", "chunks"),
    [
        ({PP: 4}, 8, (4, 3, 2, 1)),
        ({PP: 4}, 2, (2, 2, 2, 1)),
        # Warm-up 2 (3 - stage) + (2 - 1) 4, and one: Megatron's interleaved schedule.
        ({PP: 4, VPP: 2}, 8, (11, 9, 7, 5)),
        ({}, 8, (1,)),
    ],
)
def test_microbatches_in_flight(
    parallel: dict[str, Any], num_microbatches: int, chunks: tuple[int, ...]
) -> None:
    policy = PolicyConfig.model_validate({"parallel": parallel})
    stages = policy.parallel.pipeline_model_parallel_size
    found = tuple(in_flight_chunks(policy, stage, num_microbatches) for stage in range(stages))
    assert found == chunks


def test_activations_are_those_of_the_layers_in_flight() -> None:
    uneven = {PP: 2, "num_layers_in_first_pipeline_stage": 1}
    assert [stage.activations for stage in _stages(uneven)] == [
        2 * 1024 * LAYER,
        3 * 1024 * LAYER,
    ]
    (recomputed,) = _stages(recompute="full")
    assert recomputed.activations == 4 * 1024 * 2 * 256
    (kept,) = _stages()
    assert recomputed.backward - kept.backward == 1024 * LAYER


def test_state_follows_precision_and_sharding() -> None:
    (plain,) = _stages()
    parameters = plain.weights / 2
    assert (plain.gradients, plain.optimizer) == (4 * parameters, 12 * parameters)
    (single,) = _stages(dtype="float32")
    assert (single.weights, single.optimizer) == (4 * parameters, 8 * parameters)
    optimizer = {"use_distributed_optimizer": True}
    (sharded,) = _stages({DP: 2, CP: 2}, optimizer=optimizer)
    assert (sharded.gradients, sharded.optimizer) == (4 * parameters, 3 * parameters)


def test_experts_are_sharded_over_the_ranks_that_hold_the_same_ones() -> None:
    optimizer = {"use_distributed_optimizer": True}
    (rank,) = _stages({DP: 4, EP: 2}, shape=QWEN3_30B_A3B, optimizer=optimizer)
    experts = 48 * 128 * 3 * 768 * 2048
    others = 30_532_122_624 - experts
    assert rank.optimizer == 12 * (others / 4 + experts / 2 / 2)


def test_the_peak_has_the_largest_phase() -> None:
    (one,) = _stages()
    kept = one.activations + one.buffers
    assert one.head > one.backward
    assert one.total == one.resident + kept + one.head
    first, last = _stages({PP: 2})
    assert (first.head, last.embedding) == (0, 0)
    assert first.total == first.resident + first.activations + first.buffers + first.backward


def test_many_parameters_and_few_tokens_peak_in_the_optimizer() -> None:
    config = PolicyConfig(recompute="full")
    few = Workload(stream_tokens=64, stream_rows=8, num_microbatches=1)
    (memory,) = estimate_stages(LLAMA_3_8B, config, few)
    assert memory.optimizer_step == 4 * 8_030_261_248
    assert memory.working == memory.buffers + memory.optimizer_step
