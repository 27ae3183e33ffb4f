"""The same updates on 1, 2 and 4 ranks, for every layout and model family, over gloo."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from prefixrl_mcore.config.policy import ParallelConfig
from prefixrl_mcore.policy import topology
from tests.support.layouts import (
    Outcome,
    assert_equal_reports,
    assert_within_tolerance,
    hf_statistics,
    measure,
    train,
    train_on_ranks,
)
from tests.support.layouts import parallel_config as _parallel
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import build_tiny_families, write_model_folder

Reference = tuple[Path, Outcome, list[Tensor]]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """Model folder, outcome on a single rank and transformers' logprobs of each model."""
    found: dict[str, Reference] = {}
    for name, model in build_tiny_families().items():
        folder = write_model_folder(model, tmp_path_factory.mktemp("model"))
        one = train(0, folder, _parallel(), False, "none")
        found[name] = folder, one, hf_statistics(folder)
    topology.shut_down()
    return found


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "parallel", "distributed", "recompute"),
    [
        pytest.param("qwen3-tied", _parallel(tp=2), False, "none", id="tied-tp2"),
        pytest.param("qwen3-tied", _parallel(pp=2), False, "none", id="tied-pp2"),
        pytest.param(
            "qwen3-tied", _parallel(dp=2), True, "none", id="tied-dp2-distributed-optimizer"
        ),
        pytest.param("qwen3", _parallel(tp=2, sp=True), False, "full", id="tp2-sp-recompute"),
        pytest.param("qwen3-tied", _parallel(cp=2), False, "none", id="tied-cp2"),
        pytest.param("qwen3", _parallel(cp=2), False, "full", id="cp2-recompute", marks=SLOW),
        pytest.param("qwen3", _parallel(cp=4), False, "none", id="cp4", marks=SLOW),
        pytest.param("qwen3", _parallel(cp=2, tp=2), False, "none", id="cp2-tp2", marks=SLOW),
        pytest.param(
            "qwen3-tied",
            _parallel(cp=2, tp=2, sp=True),
            False,
            "none",
            id="tied-cp2-tp2-sp",
            marks=SLOW,
        ),
        pytest.param(
            "qwen3-tied", _parallel(cp=2, pp=2), False, "none", id="tied-cp2-pp2", marks=SLOW
        ),
        pytest.param(
            "qwen3", _parallel(cp=2, pp=2, vpp=2), False, "none", id="cp2-pp2-vpp2", marks=SLOW
        ),
        pytest.param(
            "qwen3-tied",
            _parallel(cp=2, dp=2),
            True,
            "none",
            id="tied-cp2-dp2-distributed",
            marks=SLOW,
        ),
        pytest.param("qwen3", _parallel(tp=2), False, "none", id="tp2", marks=SLOW),
        pytest.param("qwen3", _parallel(pp=2), False, "none", id="pp2", marks=SLOW),
        pytest.param("qwen3", _parallel(dp=2), False, "none", id="dp2", marks=SLOW),
        pytest.param(
            "qwen3-tied", _parallel(tp=2, sp=True), False, "none", id="tied-tp2-sp", marks=SLOW
        ),
        pytest.param(
            "qwen3-tied", _parallel(pp=2, vpp=2), False, "none", id="tied-pp2-vpp2", marks=SLOW
        ),
        pytest.param("qwen3", _parallel(pp=2, vpp=2), False, "none", id="pp2-vpp2", marks=SLOW),
        pytest.param(
            "qwen3-tied", _parallel(tp=2, pp=2), False, "none", id="tied-tp2-pp2", marks=SLOW
        ),
        pytest.param("qwen3", _parallel(tp=2, pp=2), False, "full", id="tp2-pp2", marks=SLOW),
        pytest.param(
            "qwen3-tied", _parallel(tp=2, dp=2), True, "none", id="tied-tp2-dp2", marks=SLOW
        ),
        pytest.param("qwen3-moe", _parallel(ep=2, dp=2), False, "none", id="moe-ep2-dp2"),
        *(
            pytest.param(
                "qwen3-moe", parallel, distributed, recompute, id=f"moe-{name}", marks=SLOW
            )
            for name, parallel, distributed, recompute in (
                ("dp2", _parallel(dp=2), False, "none"),
                ("tp2-sp", _parallel(tp=2, sp=True), False, "none"),
                ("pp2-vpp2", _parallel(pp=2, vpp=2), False, "none"),
                ("cp2", _parallel(cp=2), False, "none"),
                ("ep2-tp2-sp", _parallel(ep=2, tp=2, sp=True), False, "full"),
                ("ep2-cp2", _parallel(ep=2, cp=2), False, "none"),
                ("ep2-dp2-distributed", _parallel(ep=2, dp=2), True, "none"),
                ("ep4-dp4", _parallel(ep=4, dp=4), False, "none"),
                ("ep2-dp4-distributed", _parallel(ep=2, dp=4), True, "none"),
                ("ep4-tp2-sp-dp2", _parallel(ep=4, tp=2, sp=True, dp=2), False, "none"),
                ("ep2-dp2-pp2", _parallel(ep=2, dp=2, pp=2), False, "none"),
            )
        ),
        *(
            pytest.param(model, parallel, False, "none", id=f"{model}-{name}", marks=SLOW)
            for model in ("llama-3", "qwen2.5-tied")
            for name, parallel in (
                ("tp2-sp", _parallel(tp=2, sp=True)),
                ("pp2", _parallel(pp=2)),
                ("cp2", _parallel(cp=2)),
            )
        ),
    ],
)
def test_every_layout_does_the_same_updates(
    references: dict[str, Reference],
    name: str,
    parallel: ParallelConfig,
    distributed: bool,
    recompute: str,
) -> None:
    folder, one, truth = references[name]
    outcomes = train_on_ranks(folder, parallel, distributed=distributed, recompute=recompute)
    assert len(outcomes) == parallel.world_size
    assert_within_tolerance(measure(outcomes, one, truth))
    assert_equal_reports(outcomes, one)
    assert one.gradients is not None
    assert one.gradients["model.layers.3.self_attn.o_proj.weight"].abs().max() > 1e-3


class _NotPicklableError(Exception):
    def __init__(self, *, field: str) -> None:
        super().__init__(f"bad {field}")


def _raise_missing() -> None:
    raise FileNotFoundError("problems.jsonl")


def _raise_not_picklable() -> None:
    raise _NotPicklableError(field="answer")


def _error_of(function: Callable[[], object]) -> str:
    try:
        topology.run_on_first(function)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _talk(rank: int) -> tuple[object, ...]:
    topology.initialize(ParallelConfig(data_parallel_size=2), seed=0)
    return (
        topology.run_on_first(lambda: {"rank": rank}),
        _error_of(_raise_missing),
        _error_of(_raise_not_picklable),
        _error_of(lambda: lambda: None),
        topology.any_rank(rank == 1),
        topology.any_rank(False),
    )


def test_results_errors_and_flags_of_one_rank_reach_every_rank() -> None:
    first, second = run_on_ranks(_talk, world_size=2)
    missing = "FileNotFoundError: problems.jsonl"
    assert first[:3] == ({"rank": 0}, missing, "_NotPicklableError: bad answer")
    assert second[:3] == (
        {"rank": 0},
        missing,
        "RuntimeError: rank 0 raised _NotPicklableError: bad answer",
    )
    for outcome in (first, second):
        assert "pickle" in outcome[3]  # a result that cannot be sent is an error everywhere
        assert outcome[4:] == (True, False)
