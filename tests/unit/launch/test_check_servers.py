"""What ``prefixrl check`` says of rollout servers, beside the trainer or on GPUs of their own."""

from dataclasses import replace

import pytest

from prefixrl_mcore.accounting.server_memory import ServerMemory
from prefixrl_mcore.accounting.step_time import Assumptions
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.rollout import RolloutConfig, SGLangConfig
from prefixrl_mcore.launch.check import predict_server, step_work, with_sampling
from prefixrl_mcore.launch.machine import Machine
from prefixrl_mcore.launch.plan_report import server_lines
from tests.support.recipe_table import RECIPES, load_recipe
from tests.support.shapes import QWEN3_4B

GIB = 1024**3
SERVER = ServerMemory(
    weights=10 * GIB, static=60 * GIB, kv_bytes_per_token=GIB / 1024, max_kv_tokens=None
)
ROLLOUT = RolloutConfig(
    max_completion_tokens=10,
    max_total_tokens=12_000,
    sglang=SGLangConfig(tensor_parallel_size=2, memory_fraction=0.75),
)


def _lines(
    server: ServerMemory = SERVER, *, own_gpus: int | None, trainer_gib: float = 20
) -> list[str]:
    lines = server_lines(
        server,
        ROLLOUT,
        own_gpus=own_gpus,
        trainer_bytes=trainer_gib * GIB,
        usable_bytes=72 * GIB,
    )
    return list(lines)


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
    first, second = _lines(own_gpus=8)
    assert "weights 10.00 GiB of each GPU's 60.00" in first
    assert "a KV cache of 51200 tokens: 4 of the longest sequences at a time" in first
    assert second == "  4 server(s) on 8 GPUs of their own"


def test_beside_the_trainer_both_are_added_and_the_fraction_that_fits_is_named() -> None:
    _, together, remedy = _lines(own_gpus=None)
    assert "80.00 GiB of 72.00, too large" in together
    assert "memory_fraction = 0.65 would leave" in remedy  # (72 - 20) / 80
    assert "72.00 GiB of 72.00, fits" in _lines(own_gpus=None, trainer_gib=12)[1]
    assert len(_lines(own_gpus=None, trainer_gib=12)) == 2


def test_no_fraction_is_named_where_the_trainer_alone_is_too_large() -> None:
    assert len(_lines(own_gpus=None, trainer_gib=72)) == 2


def test_a_server_without_room_for_the_longest_sequence_is_told() -> None:
    lines = _lines(replace(SERVER, max_kv_tokens=11_999), own_gpus=2)
    assert "0 of the longest sequences" in lines[0]
    assert "not even one" in lines[1]


def test_servers_have_whole_gpus_of_rollout_nodes_or_of_their_urls() -> None:
    servers = SGLangConfig(tensor_parallel_size=4)
    assert _machine(8).own_gpus(servers) == 8
    assert _machine(None).own_gpus(servers) is None
    elsewhere = SGLangConfig(tensor_parallel_size=4, urls=("http://a:1", "http://b:1"))
    assert _machine(None).own_gpus(elsewhere) == 8
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


def test_a_server_beside_the_trainer_has_what_weights_and_gradients_leave() -> None:
    config = load_recipe(RECIPES[0])  # TP 4; each rank has all norms
    apart = predict_server(config, QWEN3_4B, _machine(8)).static
    beside = predict_server(config, QWEN3_4B, _machine(None)).static
    assert apart == 0.65 * 80 * GIB
    assert apart - beside == pytest.approx(0.65 * 6 * 4_022_468_096 / 4, rel=1e-3)
