"""Schedules of rollouts that contradict themselves, or the loss, are refused with the remedy."""

from typing import Any

import pytest

from prefixrl_mcore.config.continuation import differing_settings, fixed_settings
from prefixrl_mcore.config.run import RunConfig


def config_of(importance: str = "truncated", **schedule: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_folder": "runs/x",
            "model": {"path": "models/x"},
            "data": {"problems": "x.jsonl"},
            "loss": {"importance": importance},
            "rollout": {"schedule": schedule},
        }
    )


@pytest.mark.parametrize(
    ("importance", "schedule", "message"),
    [
        pytest.param(
            "truncated",
            {"partial": True, "max_staleness": 1},
            "oversampling = 1 none is aborted; raise oversampling",
            id="nothing to carry",
        ),
        pytest.param(
            "truncated",
            {"overlap": True},
            "max_staleness must be at least 1 with overlap, got 0",
            id="overlap is stale",
        ),
        pytest.param(
            "truncated",
            {"overlap": True, "partial": True, "oversampling": 1.5, "max_staleness": 1},
            "max_staleness must be at least 2 with overlap and partial, got 1",
            id="both are twice as stale",
        ),
        pytest.param(
            "truncated",
            {"max_staleness": 1},
            "max_staleness = 1 has no use without overlap or partial",
            id="nothing is stale",
        ),
        pytest.param(
            "none",
            {"overlap": True, "max_staleness": 1},
            'got loss.importance = "none"; set "truncated"',
            id="older weights without importance",
        ),
        pytest.param("none", {"oversampling": 0.5}, "oversampling", id="fewer than needed"),
        pytest.param(
            "none",
            {"max_rounds": 3},
            "max_rounds = 3 has no use without dynamic_sampling",
            id="rounds of nothing",
        ),
    ],
)
def test_contradictions_are_refused(
    importance: str, schedule: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(importance, **schedule)


@pytest.mark.parametrize("importance", ["truncated", "masked", "ppo_clip", "cispo"])
def test_every_importance_weight_allows_older_weights(importance: str) -> None:
    schedule = config_of(
        importance, overlap=True, partial=True, oversampling=1.25, max_staleness=2
    ).rollout.schedule
    assert schedule.is_off_policy


def test_by_default_a_run_is_strictly_on_policy_and_goes_on_from_older_checkpoints() -> None:
    config = config_of("none")
    assert config.rollout.schedule.max_staleness == 0
    assert not config.rollout.schedule.is_off_policy
    new = ("rollout.schedule.", "rollout.max_logprob_gap", "rollout.on_logprob_gap")
    saved = {key: v for key, v in fixed_settings(config).items() if not key.startswith(new)}
    assert differing_settings(saved, config) == []
    assert differing_settings(fixed_settings(config), config_of("none", oversampling=2.0)) == [
        "rollout.schedule.oversampling: 1.0 there, 2.0 now"
    ]
