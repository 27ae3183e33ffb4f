"""Recomputation gives the gradients of kept activations, bit for bit, in every kind of layout."""

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from prefixrl_mcore.config.policy import ParallelConfig
from tests.support.layouts import batch_for, parallel_config
from tests.support.policies import (
    build_policy,
    count_feed_forward_passes,
    gradients_of,
    max_difference,
)
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import build_tiny_qwen3, build_tiny_qwen3_moe, write_model_folder


def _differences(
    rank: int, folder: Path, parallel: ParallelConfig, modules: tuple[str, ...], dtype: str
) -> tuple[float, float, float]:
    """Return how far selective and full recomputation are from none, and the largest gradient.

    Both have computed every feed-forward layer twice as often.
    """
    batch = batch_for(parallel)
    outcomes, num_passes = [], []
    for settings in (
        {},
        {"recompute": "selective", "recompute_modules": modules},
        {"recompute": "full"},
    ):
        policy = build_policy(folder, parallel=parallel, dtype=dtype, **settings)
        passes = count_feed_forward_passes(policy)
        policy.update(batch)
        num_passes.append(len(passes))
        outcomes.append(gradients_of(policy))
    once = num_passes[0]
    assert num_passes == [once, 2 * once, 2 * once]
    none, selective, full = outcomes
    size = max(float(gradient.abs().max()) for gradient in none.values())
    return max_difference(selective, none), max_difference(full, none), size


DENSE, MIXTURE = ("core_attn", "mlp"), ("core_attn", "moe")


@pytest.mark.parametrize(
    ("model", "parallel", "modules", "dtype"),
    [
        pytest.param(
            build_tiny_qwen3, parallel_config(tp=2, sp=True), DENSE, "bfloat16", id="tp2 sp bf16"
        ),
        pytest.param(
            build_tiny_qwen3,
            parallel_config(pp=2),
            DENSE,
            "float32",
            id="pp2",
        ),
        pytest.param(
            build_tiny_qwen3,
            parallel_config(cp=2),
            DENSE,
            "float32",
            id="cp2",
        ),
        pytest.param(
            build_tiny_qwen3_moe,
            parallel_config(ep=2, dp=2),
            MIXTURE,
            "float32",
            id="ep2 dp2",
        ),
    ],
)
def test_recomputation_changes_no_bit(
    tmp_path: Path,
    model: type[PreTrainedModel],
    parallel: ParallelConfig,
    modules: tuple[str, ...],
    dtype: str,
) -> None:
    folder = write_model_folder(model(), tmp_path / "model")
    outcomes = run_on_ranks(
        _differences, folder, parallel, modules, dtype, world_size=parallel.world_size
    )
    for selective, full, size in outcomes:
        assert (selective, full) == (0.0, 0.0)
        assert size > 0.02
