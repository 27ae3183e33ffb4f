"""The KL term in every kind of layout: the same updates as one process."""

from pathlib import Path

import pytest

from prefixrl_mcore.records import UpdateResult
from tests.support.layouts import NORM_TOLERANCE, parallel_config
from tests.support.ranks import run_on_ranks
from tests.support.reference_runs import update_twice
from tests.support.tiny_models import build_tiny_qwen3, build_tiny_qwen3_moe, write_model_folder

LAYOUTS = {
    "pp2-vpp2": ({"pp": 2, "vpp": 2}, False),
    "tp2-sp": ({"tp": 2, "sp": True}, False),
    "cp2": ({"cp": 2}, False),
    "dp2-distributed-optimizer": ({"dp": 2}, True),
}


@pytest.mark.slow
def test_updates_with_a_reference_are_the_same_in_every_layout(tmp_path: Path) -> None:
    sizes = {"num_layers": 4, "vocab_size": 33}
    folders = [
        write_model_folder(
            build_tiny_qwen3(seed=seed, **sizes, tie_word_embeddings=False), tmp_path / str(seed)
        )
        for seed in (0, 1)
    ]
    (one,) = run_on_ranks(update_twice, *folders, parallel_config(), False, world_size=1)
    assert one[0].metrics["loss/reference_k3_nats"] > 0.1
    for name, (layout, distributed) in LAYOUTS.items():
        results = run_on_ranks(
            update_twice, *folders, parallel_config(**layout), distributed, world_size=2
        )
        _assert_equal_updates(results, one, name)


@pytest.mark.slow
def test_experts_elsewhere_and_recomputed_have_a_reference_too(tmp_path: Path) -> None:
    folders = [
        write_model_folder(build_tiny_qwen3_moe(seed=seed), tmp_path / str(seed)) for seed in (0, 1)
    ]
    (one,) = run_on_ranks(update_twice, *folders, parallel_config(), False, world_size=1)
    layout = parallel_config(ep=2, dp=2)
    results = run_on_ranks(update_twice, *folders, layout, False, "full", "grouped", world_size=2)
    _assert_equal_updates(results, one, "ep2-dp2")


def _assert_equal_updates(
    results: list[list[UpdateResult]], one: list[UpdateResult], name: str
) -> None:
    """Fail if a rank's updates are not those of one process."""
    for updates in results:
        for ours, theirs in zip(updates, one, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5), name
            assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=NORM_TOLERANCE), (
                name
            )
            assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-4, abs=1e-6), name
