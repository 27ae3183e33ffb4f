"""Predicted host memory against bytes worked out by hand.

SMALL has 3 410 176 parameters: 4 layers of 786 432 + 576, two embeddings of 131 072, one norm.
"""

from typing import Any

import pytest

from prefixrl_mcore.accounting.host_memory import HostMemory, estimate_host
from prefixrl_mcore.config.policy import PolicyConfig
from tests.support.shapes import SMALL

P = 4 * (786_432 + 576) + 2 * 131_072 + 256


def _host(*, has_reference: bool = False, **policy: Any) -> HostMemory:
    return estimate_host(SMALL, PolicyConfig.model_validate(policy), has_reference=has_reference)


def test_a_save_copies_weights_and_state_twice_and_keeps_one_copy() -> None:
    assert (_host().save, _host().written) == (2 * 14 * P, 14 * P)
    single = _host(dtype="float32")
    assert (single.save, single.written) == (2 * 12 * P, 12 * P)


@pytest.mark.parametrize(("dtype", "written"), [("bfloat16", 14), ("float32", 16)])
def test_the_distributed_optimizer_gathers_its_state_on_every_rank(
    dtype: str, written: int
) -> None:
    host = _host(
        dtype=dtype,
        parallel={"data_parallel_size": 4},
        optimizer={"use_distributed_optimizer": True},
    )
    assert (host.save, host.written) == (36 * P, written * P)


def test_a_reference_is_there_twice() -> None:
    host = _host(has_reference=True)
    assert host.reference == 2 * 2 * P
    assert host.total == (4 + 28) * P
    assert _host().reference == 0


def test_an_offloaded_optimizer_is_sharded() -> None:
    host = _host(
        parallel={"data_parallel_size": 4},
        optimizer={
            "use_distributed_optimizer": True,
            "use_precision_aware_optimizer": True,
            "cpu_offload": True,
            "cpu_offload_fraction": 0.5,
        },
    )
    assert host.offloaded == 12 * 0.5 * P / 4


def test_the_largest_stage_counts() -> None:
    uneven = {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}
    assert _host(parallel=uneven).written == 14 * (3 * (786_432 + 576) + 131_072 + 256)
