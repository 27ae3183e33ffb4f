"""The same updates on 1 to 8 ranks, for every layout and model family, over gloo."""

from collections.abc import Callable

import pytest

from prefixrl_mcore.config.policy import ParallelConfig
from prefixrl_mcore.policy import topology
from tests.support.layouts import (
    CASES,
    LayoutCase,
    Reference,
    assert_equal_reports,
    assert_within_tolerance,
    measure,
    train_alone,
    train_on_ranks,
)
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import build_tiny_families


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """What one process and transformers say of each model."""
    found = {
        name: train_alone(model, tmp_path_factory.mktemp("model"))
        for name, model in build_tiny_families().items()
    }
    topology.shut_down()
    return found


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.label, marks=[pytest.mark.slow] if case.is_slow else [])
        for case in CASES
    ],
)
def test_every_layout_does_the_same_updates(
    references: dict[str, Reference], case: LayoutCase
) -> None:
    reference = references[case.model]
    outcomes = train_on_ranks(reference.folder, case)
    assert len(outcomes) == case.parallel.world_size
    assert_within_tolerance(measure(outcomes, reference))
    assert_equal_reports(outcomes, reference.one)
    weight = "model.layers.3.self_attn.o_proj.weight"
    assert reference.one.gradients[weight].abs().max() > 1e-3


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
        passed_on = " (passed on)" if topology.is_from_first(error) else ""
        return f"{type(error).__name__}: {error}{passed_on}"
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
        f"{missing} (passed on)",
        "RuntimeError: rank 0 raised _NotPicklableError: bad answer (passed on)",
    )
    for outcome in (first, second):
        assert "pickle" in outcome[3]  # a result that cannot be sent is an error everywhere
        assert outcome[4:] == (True, False)
