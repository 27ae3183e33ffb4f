"""Which GPUs servers get beside a trainer, and the arithmetic where there are too few."""

import pytest

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.rollout import RolloutConfig, SGLangConfig
from prefixrl_mcore.config.server_gpus import check_server_gpus, server_gpus

TWO_OF_TWO = SGLangConfig(num_servers=2, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("colocated", "num_ranks", "expected"),
    [
        pytest.param(False, 4, [[4, 5], [6, 7]], id="after the trainer's"),
        pytest.param(False, 1, [[1, 2], [3, 4]], id="one rank"),
        pytest.param(False, 0, [[0, 1], [2, 3]], id="nothing is trained"),
        pytest.param(True, 4, [[0, 1], [2, 3]], id="the trainer's own"),
        pytest.param(True, 8, [[0, 1], [2, 3]], id="some of the trainer's"),
    ],
)
def test_servers_have_the_gpus_after_the_trainers_or_take_turns_on_them(
    *, colocated: bool, num_ranks: int, expected: list[list[int]]
) -> None:
    placed = server_gpus(TWO_OF_TWO, colocated=colocated, num_trainer_ranks=num_ranks, num_gpus=8)

    assert [list(gpus) for gpus in placed] == expected


def test_too_few_gpus_are_refused_with_the_arithmetic_and_the_remedies() -> None:
    with pytest.raises(ConfigError) as refused:
        server_gpus(TWO_OF_TWO, colocated=False, num_trainer_ranks=5, num_gpus=8)
    text = str(refused.value)
    assert "5 trainer ranks + 2 servers x TP 2 = 9 GPUs, but the node of rank 0" in text
    assert "has 8; set rollout.colocated = true" in text
    with pytest.raises(ConfigError, match=r"2 servers x TP 2 = 4 GPUs, .* has 3; lower num_ser"):
        server_gpus(TWO_OF_TWO, colocated=True, num_trainer_ranks=3, num_gpus=3)


def test_servers_that_the_run_does_not_start_need_no_gpus_here() -> None:
    elsewhere = SGLangConfig(urls=("http://a:1",), tensor_parallel_size=8)
    check_server_gpus(RolloutConfig(sglang=elsewhere), num_trainer_ranks=8, num_gpus=8)
    alone = RolloutConfig(engine="transformers")
    check_server_gpus(alone, num_trainer_ranks=8, num_gpus=8)
    with pytest.raises(ConfigError, match="8 trainer ranks"):
        check_server_gpus(RolloutConfig(), num_trainer_ranks=8, num_gpus=8)
