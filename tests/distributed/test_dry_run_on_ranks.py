"""A dry-run step changes nothing, bit for bit, on every rank of every kind of layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixrl_mcore.checkpoint.random_states import get_rng_state
from prefixrl_mcore.config.policy import LossConfig, OptimizerConfig, ParallelConfig
from prefixrl_mcore.data.packing import PackedBatch
from prefixrl_mcore.observability.phases import Phases
from prefixrl_mcore.policy import topology
from prefixrl_mcore.policy.policy import MegatronPolicy
from tests.support.policies import build_policy, make_batch, make_sequences
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import (
    build_tiny_qwen3,
    build_tiny_qwen3_moe,
    write_model_folder,
    write_tiny_qwen3,
)


class _DrawingPhases(Phases):
    """Draws from the random generators within each microbatch, as dropout would."""

    num_draws = 0

    def beat(self) -> None:
        torch.rand(3)
        self.num_draws += 1


def state_of(policy: MegatronPolicy) -> dict[str, Any]:
    """Return copies of all that the next step depends on, of this rank."""
    parameters = [p for chunk in policy.model_chunks for p in chunk.parameters()]
    parts = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    masters = [p for part in parts for g in part.optimizer.param_groups for p in g["params"]]
    moments = [
        value
        for part in parts
        for state in part.optimizer.state.values()
        for value in state.values()
    ]
    tensors = [*parameters, *masters, *moments, *(p.main_grad for p in parameters)]
    return {
        "tensors": [torch.as_tensor(tensor).detach().clone() for tensor in tensors],
        "schedule": policy.scheduler.state_dict(),
        "rng": get_rng_state(),
        "version": policy.policy_version,
        "learning_rate": policy.learning_rate,
    }


def assert_equal_states(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name in ("schedule", "version", "learning_rate"):
        assert before[name] == after[name], name
    assert len(before["tensors"]) == len(after["tensors"])
    for one, other in zip(before["tensors"], after["tensors"], strict=True):
        assert torch.equal(one, other)
    rng, other = before["rng"], after["rng"]
    assert rng["python"] == other["python"]
    assert str(rng["numpy"]) == str(other["numpy"])
    assert torch.equal(rng["torch"], other["torch"])
    assert rng["megatron"].keys() == other["megatron"].keys()
    for name, state in rng["megatron"].items():
        assert torch.equal(state, other["megatron"][name])


def _batch(policy: MegatronPolicy, *, seed: int) -> PackedBatch:
    parallel = policy._policy.parallel
    return make_batch(
        make_sequences(seed=seed),
        num_ranks=parallel.data_parallel_size,
        streams_multiple=parallel.microbatch_multiple,
        sequence_multiple=parallel.sequence_multiple,
    )


def dry_run_between_steps(
    rank: int, folder: Path, parallel: ParallelConfig, dtype: str, sharded: bool, loss: LossConfig
) -> None:
    policy = build_policy(
        folder,
        parallel=parallel,
        dtype=dtype,
        loss=loss,
        optimizer=OptimizerConfig(
            lr=1e-3, schedule="linear", weight_decay=0.1, use_distributed_optimizer=sharded
        ),
    )
    policy.update(_batch(policy, seed=0))
    policy._zero_gradients()  # a dry run leaves none, which the next step begins with anyway
    before = state_of(policy)
    assert policy.policy_version == 1
    assert any(float(tensor.float().abs().max()) > 0 for tensor in before["tensors"])
    policy.phases = phases = _DrawingPhases()
    policy.dry_run(_batch(policy, seed=1))
    assert phases.num_draws > 0
    assert_equal_states(before, state_of(policy))


def _write_mixture(folder: Path) -> Path:
    return write_model_folder(build_tiny_qwen3_moe(), folder)


def _write_four_layers(folder: Path) -> Path:
    return write_model_folder(build_tiny_qwen3(num_layers=4), folder)


@pytest.mark.parametrize(
    ("parallel", "dtype", "sharded", "loss", "write_model"),
    [
        pytest.param(
            ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
            "float32",
            False,
            LossConfig(kl="k3", kl_coefficient=0.1),
            write_tiny_qwen3,
            id="TP2 SP KL",
        ),
        pytest.param(
            ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
            "bfloat16",
            False,
            LossConfig(),
            _write_four_layers,
            id="PP2 VPP2 bfloat16",
        ),
        pytest.param(
            ParallelConfig(data_parallel_size=2, expert_model_parallel_size=2),
            "bfloat16",
            True,
            LossConfig(),
            _write_mixture,
            id="DP2 EP2 mixture sharded bfloat16",
        ),
        pytest.param(
            ParallelConfig(context_parallel_size=2),
            "float32",
            True,
            LossConfig(),
            write_tiny_qwen3,
            id="CP2 sharded",
        ),
    ],
)
def test_a_dry_run_leaves_every_rank_as_it_was(
    tmp_path: Path,
    parallel: ParallelConfig,
    dtype: str,
    sharded: bool,
    loss: LossConfig,
    write_model: Callable[[Path], Path],
) -> None:
    folder = write_model(tmp_path / "model")
    run_on_ranks(dry_run_between_steps, folder, parallel, dtype, sharded, loss, world_size=2)


@pytest.fixture
def _leave_the_process_group() -> Any:
    yield
    topology.shut_down()


@pytest.mark.usefixtures("_leave_the_process_group")
def test_a_fresh_policy_takes_the_same_steps_after_a_dry_run(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path / "model")
    states: list[list[Tensor]] = []
    for is_dry in (False, True):
        policy = build_policy(folder)
        if is_dry:
            policy.dry_run(_batch(policy, seed=1))
        for seed in (0, 2):
            policy.update(_batch(policy, seed=seed))
        states.append(state_of(policy)["tensors"])
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)
