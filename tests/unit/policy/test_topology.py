"""Joining the process group and Megatron's groups, for a single process."""

import gc
import os
from pathlib import Path

import pytest

from prefixrl_mcore.config.policy import ParallelConfig
from prefixrl_mcore.policy import topology
from tests.support.policies import build_policy


def test_a_single_process_needs_no_environment() -> None:
    place = topology.initialize(ParallelConfig(), seed=0, environment={})
    assert (place.rank, place.world_size) == (0, 1)
    assert (place.tp_size, place.pp_size, place.cp_size, place.dp_size) == (1, 1, 1, 1)
    assert place.is_first
    assert place.is_last_stage
    assert topology.current() == place
    assert topology.initialize(ParallelConfig(), seed=1, environment={}) == place


def test_groups_that_were_shut_down_are_let_go_with_their_models(tied_folder: Path) -> None:
    gc.disable()  # it would do so too, some day
    try:
        num_open: list[int] = []
        for _ in range(4):
            topology.shut_down()
            build_policy(tied_folder)
            num_open.append(len(os.listdir("/proc/self/fd")))
    finally:
        gc.enable()
    assert max(num_open[1:]) <= num_open[1] + 20, num_open  # a group has about 70


def test_a_layout_for_more_processes_is_refused() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, data_parallel_size=3)
    with pytest.raises(ValueError, match=r"needs 6 processes .* got 1"):
        topology.initialize(parallel, seed=0, environment={})


def test_experts_that_cannot_be_spread_over_a_stage_are_refused_with_the_arithmetic() -> None:
    parallel = ParallelConfig(
        expert_model_parallel_size=4, data_parallel_size=3, tensor_model_parallel_size=2
    )
    message = r"= 4 does not divide the 6 ranks of a pipeline stage \(tensor 2 x context 1 x data 3"
    with pytest.raises(ValueError, match=message):
        topology.initialize(parallel, seed=0, environment={})


def test_experts_that_are_cut_count_twice() -> None:
    parallel = ParallelConfig(
        expert_model_parallel_size=2, expert_tensor_parallel_size=4, data_parallel_size=4
    )
    message = r"= 2 x expert_tensor_parallel_size = 4 = 8 does not divide the 4 ranks"
    with pytest.raises(ValueError, match=message):
        topology.initialize(parallel, seed=0, environment={})


def test_a_launcher_that_sets_half_the_variables_is_named() -> None:
    topology.shut_down()
    parallel = ParallelConfig(data_parallel_size=2)
    with pytest.raises(ValueError, match="RANK, MASTER_PORT not set"):
        topology.initialize(
            parallel, seed=0, environment={"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        )


def test_without_a_layout_there_is_no_current_topology() -> None:
    topology.shut_down()
    with pytest.raises(RuntimeError, match=r"call topology\.initialize first"):
        topology.current()


def test_run_on_first_is_a_plain_call_in_a_single_process() -> None:
    topology.shut_down()
    assert topology.run_on_first(lambda: 7) == 7
    topology.initialize(ParallelConfig(), seed=0, environment={})
    assert topology.run_on_first(lambda: 8) == 8
    assert topology.any_rank(True)
    assert not topology.any_rank(False)
    with pytest.raises(KeyError, match="gone"):
        topology.run_on_first(lambda: {}["gone"])
