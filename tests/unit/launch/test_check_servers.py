"""What ``prefixrl check`` says of rollout servers, beside the trainer or on GPUs of their own."""

from dataclasses import replace

import pytest

from prefixrl_mcore.accounting.memory import StageMemory
from prefixrl_mcore.accounting.server_memory import ServerMemory
from prefixrl_mcore.accounting.shared_gpu import SharedGpu, share_gpu
from prefixrl_mcore.accounting.step_time import Assumptions
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.policy import PolicyConfig
from prefixrl_mcore.config.rollout import RolloutConfig, SGLangConfig
from prefixrl_mcore.launch.check import step_work
from prefixrl_mcore.launch.machine import Machine
from prefixrl_mcore.launch.server_plan import (
    own_server_lines,
    predict_server,
    share_gpus,
    shared_server_lines,
    with_sampling,
)
from tests.support.recipe_layouts import RECIPES, load_recipe
from tests.support.shapes import QWEN3_4B

GIB = 1024**3
SERVER = ServerMemory(
    weights=10 * GIB,
    static=60 * GIB,
    kv_bytes_per_token=GIB / 1024,
    max_kv_tokens=None,
    asleep=2 * GIB,
    activations=8 * GIB,
)
STAGE = StageMemory(
    stage=0,
    weights=GIB,
    gradients=2 * GIB,
    optimizer=3 * GIB,
    activations=14 * GIB,
    buffers=0,
    head=0,
    backward=0,
    embedding=0,
    optimizer_step=0,
    last_activations=14 * GIB,
)
ROLLOUT = RolloutConfig(
    max_completion_tokens=10,
    max_total_tokens=12_000,
    sglang=SGLangConfig(tensor_parallel_size=2, memory_fraction=0.75),
)


def _own_lines(server: ServerMemory = SERVER) -> list[str]:
    return list(own_server_lines(server, ROLLOUT, 8, _machine(8)))


def _shared_lines(server: ServerMemory = SERVER, stage: StageMemory = STAGE) -> list[str]:
    """Return all but the table; the fraction 0.75 is of 80 GiB."""
    shared = share_gpu(stage, server, sync_bytes=0.0)
    lines = shared_server_lines(server, ROLLOUT, shared, [stage], _machine(None))
    return [line for line in lines if isinstance(line, str)]


def _machine(rollout_gpus: int | None) -> Machine:
    return Machine(
        num_gpus=None,
        memory_gib=80.0,
        reserved_fraction=0.1,
        assumptions=Assumptions(peak_flops=1e12),
        mean_tokens=None,
        rollout_gpus=rollout_gpus,
    )


def test_a_server_of_its_own_says_how_many_sequences_it_runs() -> None:
    first, second = _own_lines()
    assert "weights 10.00 GiB of each GPU's 60.00" in first
    assert "a KV cache of 51200 tokens: 4 of the longest sequences at a time" in first
    assert second.startswith("  4 server(s) on 8 GPUs of their own: with 10.00 GiB of buffers")
    assert second.endswith("activations 70.00 of 80.00, fits")


def test_a_server_of_its_own_that_is_too_large_names_the_fraction_that_fits() -> None:
    _, verdict, remedy = _own_lines(replace(SERVER, activations=19 * GIB))
    assert verdict.endswith("81.00 of 80.00, does not fit")
    assert "memory_fraction = 0.73 would fit" in remedy  # (60 - 1) / 80


def test_beside_the_trainer_the_worst_phase_decides_and_remedies_are_named() -> None:
    large = replace(STAGE, activations=74 * GIB, last_activations=74 * GIB)
    _, together, *remedies = _shared_lines(stage=large)  # 80 + 2 in the update
    assert "82.00 GiB of 72.00, in the update, does not fit" in together
    (remedy,) = remedies  # no memory_fraction would help
    assert "--rollout-gpus N" in remedy


def test_a_sleeping_server_is_judged_by_the_sampling() -> None:
    _, together, *remedies = _shared_lines()  # 6 + 70
    assert "76.00 GiB of 72.00, in the sampling, does not fit" in together
    assert "--rollout-gpus N" in remedies[0]
    assert "memory_fraction = 0.7 would fit" in remedies[1]  # (60 - 4) / 80
    small = replace(SERVER, static=56 * GIB)
    assert "72.00 GiB of 72.00, in the sampling, fits" in _shared_lines(small)[1]
    assert len(_shared_lines(small)) == 2


def test_no_fraction_is_named_where_the_trainer_leaves_no_room_for_weights() -> None:
    lines = _shared_lines(replace(SERVER, activations=60 * GIB))
    assert not any("memory_fraction =" in line for line in lines)


def test_a_server_without_room_for_the_longest_sequence_is_told() -> None:
    lines = _own_lines(replace(SERVER, max_kv_tokens=11_999))
    assert "0 of the longest sequences" in lines[0]
    assert "does not fit: not even one" in lines[1]


def test_servers_have_whole_gpus_of_rollout_nodes_or_of_their_urls() -> None:
    servers = RolloutConfig(sglang=SGLangConfig(tensor_parallel_size=4))
    assert _machine(8).own_gpus(servers) == 8
    assert _machine(None).own_gpus(servers) == 4
    assert _machine(None).own_gpus(servers.model_copy(update={"colocated": True})) is None
    urls = SGLangConfig(tensor_parallel_size=4, urls=("http://a:1", "http://b:1"))
    assert _machine(None).own_gpus(RolloutConfig(sglang=urls)) == 8
    with pytest.raises(ConfigError, match=r"--rollout-gpus 6 .* give a multiple of 4"):
        _machine(6).own_gpus(servers)
    with pytest.raises(ConfigError, match="--rollout-gpus must be at least 1, got 0"):
        _machine(0)


def test_those_gpus_sample_that_have_a_server() -> None:
    config = load_recipe(RECIPES[0])  # four servers of two GPUs, on the trainer's
    work = step_work(config, 10_000)

    def sampling(machine: Machine, **rollout: object) -> Assumptions:
        changed = config.rollout.model_copy(update=rollout)
        run = config.model_copy(update={"rollout": changed})
        return with_sampling(run, QWEN3_4B, work, machine).assumptions

    assert sampling(_machine(None)).rollout_gpus == 8
    assert sampling(_machine(32)).rollout_gpus == 32
    one = config.rollout.sglang.model_copy(update={"num_servers": 1})
    assert sampling(_machine(None), sglang=one).rollout_gpus == 2
    assert sampling(_machine(None), engine="transformers").rollout_gpus == 1
    assert sampling(_machine(None)).decode_seconds == 0.0  # of a GPU without known bandwidth
    assert sampling(replace(_machine(None), memory_bytes_per_second=1e12)).decode_seconds > 0


def test_servers_that_run_already_stand_on_the_trainers_later_stages_too() -> None:
    config = load_recipe(RECIPES[0])
    parallel = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}
    policy = PolicyConfig.model_validate({"parallel": parallel})
    stages = [STAGE, replace(STAGE, stage=1, activations=100 * GIB)]

    def shared_stage(*urls: str) -> int:
        sglang = SGLangConfig(urls=urls, tensor_parallel_size=4)
        rollout = config.rollout.model_copy(update={"sglang": sglang, "colocated": True})
        run = config.model_copy(update={"policy": policy, "rollout": rollout})
        return share_gpus(run, QWEN3_4B, stages, _machine(None)).stage

    assert shared_stage("http://a:1") == 0
    assert shared_stage("http://a:1", "http://b:1") == 1


def test_the_gpu_that_needs_most_has_rank_0s_context_or_its_export() -> None:
    config = load_recipe(RECIPES[0])  # four servers of two GPUs, on the trainer's eight

    def shared(num_servers: int, **changes: object) -> SharedGpu:
        found = {"num_servers": num_servers} | changes
        sglang = config.rollout.sglang.model_copy(update=found)
        rollout = config.rollout.model_copy(update={"sglang": sglang})
        run = config.model_copy(update={"rollout": rollout})
        return share_gpus(run, QWEN3_4B, [STAGE], _machine(None))

    alone, all_gpus = shared(1, tensor_parallel_size=1), shared(8, tensor_parallel_size=1)
    assert all_gpus.sampling - alone.sampling == GIB / 2
    assert all_gpus.update - alone.update == GIB / 2
    embedding = 2 * 151_936 * 2560
    assert alone.sync - all_gpus.sync == 2 * embedding - GIB / 2


def test_a_server_beside_the_trainer_has_what_it_leaves_at_the_start() -> None:
    config = load_recipe(RECIPES[0])  # TP 4, DP 2; each rank has all norms
    apart = predict_server(config, QWEN3_4B, _machine(8)).static
    beside = predict_server(config, QWEN3_4B, _machine(None)).static
    assert apart == 0.5 * 80 * GIB
    assert apart - beside == pytest.approx(0.5 * (6 + 4 / 2) * 4_022_468_096 / 4, rel=1e-3)
