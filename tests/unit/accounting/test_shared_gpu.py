"""A GPU of trainer and server, phase by phase, against bytes worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest

from prefixrl_mcore.accounting.memory import StageMemory, Workload, estimate_stages
from prefixrl_mcore.accounting.server_memory import ServerMemory, estimate_server
from prefixrl_mcore.accounting.shared_gpu import (
    left_context_bytes,
    memory_at_start,
    share_gpu,
    shared_ranks,
    shared_stages,
    stage_of,
    sync_export_bytes,
    sync_receive_bytes,
)
from prefixrl_mcore.config.policy import PolicyConfig
from prefixrl_mcore.config.rollout import SGLangConfig, SyncConfig
from tests.support.shapes import LLAMA_3_8B, QWEN3_4B

GIB = 1024**3
MIB = 1024**2

STAGE = StageMemory(
    stage=0,
    weights=2 * GIB,
    gradients=4 * GIB,
    optimizer=6 * GIB,
    activations=20 * GIB,
    buffers=GIB,
    head=3 * GIB,
    backward=2 * GIB,
    embedding=0,
    optimizer_step=2 * GIB,
    last_activations=20 * GIB,
)
"""Resident 12 GiB, peak 36 GiB."""

SERVER = ServerMemory(
    weights=4 * GIB,
    static=34 * GIB,
    kv_bytes_per_token=GIB / 1024,
    max_kv_tokens=None,
    asleep=2 * GIB,
    activations=12 * GIB,
)
"""Awake 4 + 30 + 2 + 12 = 48 GiB."""


def test_a_sleeping_server_leaves_the_update_all_but_its_graphs() -> None:
    shared = share_gpu(STAGE, SERVER, sync_bytes=3 * GIB)
    assert shared.sampling == (12 + 48) * GIB
    assert shared.sync == (12 + 3 + 4 + 2) * GIB  # both sides' weights, no KV cache yet
    assert shared.update == (36 + 2) * GIB
    assert (shared.peak, shared.peak_phase) == (60 * GIB, "sampling")


def test_the_sync_is_the_peak_where_the_cache_is_small() -> None:
    small = replace(SERVER, weights=30 * GIB, max_kv_tokens=1024, activations=0.0)
    tight = share_gpu(STAGE, small, sync_bytes=3 * GIB)
    assert tight.sampling == (12 + 30 + 1 + 2) * GIB
    assert (tight.peak, tight.peak_phase) == ((12 + 3 + 30 + 2) * GIB, "sync")


def _policy(**changes: Any) -> PolicyConfig:
    parallel = {"tensor_model_parallel_size": 8, "sequence_parallel": True}
    return PolicyConfig.model_validate({"dtype": "bfloat16", "parallel": parallel} | changes)


def test_the_server_starts_beside_weights_gradients_and_main_weights() -> None:
    # Llama-3.1-8B on TP 8: 32 layers of 218 103 808 / 8 and 8192 of norms, two vocabularies of
    # 128 256 x 4096 / 8, one norm of 4096; the moments, 8 bytes each, come with the first update.
    parameters = 32 * (27_262_976 + 8192) + 2 * 65_667_072 + 4096
    assert memory_at_start(LLAMA_3_8B, _policy(), 0) == (2 + 4 + 4) * parameters
    stage = estimate_stages(
        LLAMA_3_8B, _policy(), Workload(stream_tokens=1024, stream_rows=1024, num_microbatches=1)
    )[0]
    assert stage.resident - memory_at_start(LLAMA_3_8B, _policy(), 0) == 8 * parameters


def test_main_weights_are_sharded_halved_or_elsewhere_as_the_optimizer_says() -> None:
    parallel = {"data_parallel_size": 2}
    whole = memory_at_start(QWEN3_4B, _policy(parallel=parallel), 0)
    sharded = {"use_distributed_optimizer": True}
    one = memory_at_start(QWEN3_4B, _policy(parallel=parallel, optimizer=sharded), 0)
    parameters = 4_022_468_096
    assert (whole, one) == (10 * parameters, 8 * parameters)
    half = sharded | {"use_precision_aware_optimizer": True, "main_params_dtype": "float16"}
    assert memory_at_start(QWEN3_4B, _policy(parallel=parallel, optimizer=half), 0) == (
        7 * parameters
    )
    away = sharded | {"use_precision_aware_optimizer": True, "cpu_offload": True}
    assert memory_at_start(QWEN3_4B, _policy(parallel=parallel, optimizer=away), 0) == (
        6 * parameters
    )
    assert memory_at_start(QWEN3_4B, _policy(dtype="float32", parallel={}), 0) == 8 * parameters


def test_rank_0_exports_the_largest_weight_twice_and_two_buckets() -> None:
    embedding = 2 * 151_936 * 2560
    assert sync_export_bytes(QWEN3_4B, SGLangConfig()) == 2 * embedding + 2 * embedding
    large = SGLangConfig(sync=SyncConfig(bucket_bytes=2 * GIB))
    assert sync_export_bytes(QWEN3_4B, large) == 2 * embedding + 4 * GIB


def test_other_gpus_have_two_buckets_and_rank_0s_context_on_its_machine() -> None:
    embedding = 2 * 151_936 * 2560
    assert sync_receive_bytes(QWEN3_4B, SGLangConfig()) == 2 * embedding
    contexts = [left_context_bytes(SGLangConfig(), rank=r, gpus_per_node=8) for r in (0, 1, 7, 8)]
    assert contexts == [0, 512 * MIB, 512 * MIB, 0]
    by_files = SGLangConfig(sync=SyncConfig(transport="disk"))
    assert sync_receive_bytes(QWEN3_4B, by_files) == 0
    assert left_context_bytes(by_files, rank=1, gpus_per_node=8) == 0


def test_a_context_stays_in_every_phase() -> None:
    without, shared = (
        share_gpu(STAGE, SERVER, sync_bytes=3 * GIB, context_bytes=size) for size in (0, GIB)
    )
    phases = [(one.sampling, one.sync, one.update) for one in (without, shared)]
    assert [b - a for a, b in zip(*phases, strict=True)] == [GIB] * 3


@pytest.mark.parametrize(
    ("stages", "gpus", "ranks"),
    [(1, 1, [0]), (1, 8, [0, 1]), (2, 4, [0, 1]), (2, 5, [0, 1, 4]), (8, 8, list(range(8)))],
)
def test_one_rank_of_each_stage_stands_for_all_but_rank_0(
    stages: int, gpus: int, ranks: list[int]
) -> None:
    parallel = {"tensor_model_parallel_size": 8 // stages, "pipeline_model_parallel_size": stages}
    policy = _policy(parallel=parallel)
    assert shared_ranks(policy, gpus) == ranks
    assert stage_of(policy, ranks[-1]) == max(shared_stages(policy, gpus))


@pytest.mark.parametrize(("gpus", "stages"), [(2, [0]), (4, [0]), (5, [0, 1]), (64, [0, 1])])
def test_servers_stand_on_the_first_stages(gpus: int, stages: list[int]) -> None:
    parallel = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}
    assert list(shared_stages(_policy(parallel=parallel), gpus)) == stages


def test_a_recipe_by_hand() -> None:
    # Llama-3.1-8B, TP 8, servers of 4 GPUs: P = 1 004 015 616 a rank, 18 P resident, 10 P of it
    # when the server starts, which then has 0.45 of the rest.
    rank, whole = 1_004_015_616, 8_030_261_248
    static = 0.45 * (80 * GIB - 10 * rank)
    server = estimate_server(
        LLAMA_3_8B,
        SGLangConfig(tensor_parallel_size=4, memory_fraction=0.45),
        gpu_memory_bytes=80 * GIB - memory_at_start(LLAMA_3_8B, _policy(), 0),
    )
    tokens = int((static - whole / 2) // 32_768)
    assert (server.static, server.kv_tokens) == (pytest.approx(static), tokens)
    stage = replace(STAGE, weights=2 * rank, gradients=4 * rank, optimizer=12 * rank)
    shared = share_gpu(stage, server, sync_bytes=0.0)
    asleep = (512 + 512 + 2 * 512 + 8 * 58) * MIB
    assert shared.sampling == 18 * rank + whole / 2 + tokens * 32_768 + asleep + 12 * GIB
    assert shared.sync == 18 * rank + whole / 2 + asleep
