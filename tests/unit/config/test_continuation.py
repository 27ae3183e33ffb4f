"""What a continued run may change, and how saved settings are compared with the present."""

from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.continuation import (
    check_saved_settings,
    default_settings,
    describe_settings,
    differing_settings,
    fixed_settings,
    settings_hash,
)
from prefixrl_mcore.config.policy import PolicyConfig
from prefixrl_mcore.config.run import RunConfig


def config(**changes: Any) -> RunConfig:
    values = {
        "run_folder": "run",
        "model": {"path": "model"},
        "data": {"problems": "p.jsonl", "held_out": {"hard": "h.jsonl"}},
    }
    return RunConfig.model_validate(values | changes)


def test_a_setting_that_came_later_counts_only_when_it_is_used() -> None:
    saved = fixed_settings(config())
    del saved["loss.entropy_coefficient"]  # as if an earlier version had not known it
    assert differing_settings(saved, config()) == []
    used = config(loss={"entropy_coefficient": 0.1})
    assert differing_settings(saved, used) == ["loss.entropy_coefficient: not set there, 0.1 now"]


def test_every_difference_is_named() -> None:
    saved = fixed_settings(config())
    saved["data.shuffle.fast"] = True
    now = config(seed=3, data={"problems": "p.jsonl", "traces": "t"})
    del saved["data.traces"]
    assert differing_settings(saved, now) == [
        "data.shuffle.fast: True there, no such setting now",
        "data.traces: not set there, 't' now",
        "seed: 0 there, 3 now",
    ]


DECAYING = {"optimizer": {"schedule": "linear"}}


def test_the_length_of_a_run_whose_learning_rate_falls_may_not_change() -> None:
    saved = fixed_settings(config(policy=DECAYING, trainer={"num_steps": 40}))
    now = config(policy=DECAYING, trainer={"num_steps": 41, "max_flops": 1.0})
    assert differing_settings(saved, now) == [
        "trainer.num_steps: 40 there, 41 now (the learning rate falls over the run: it would jump)"
    ]


@pytest.mark.parametrize("engine", ["sglang", "transformers"])
def test_what_the_engine_samples_may_not_change(engine: str) -> None:
    saved = fixed_settings(config())
    dtypes = {"sglang": "float32", "transformers": "bfloat16"}
    now = config(rollout={engine: {"dtype": dtypes[engine]}})
    assert [line.partition(":")[0] for line in differing_settings(saved, now)] == [
        f"rollout.{engine}.dtype"
    ]


def test_a_default_that_changed_since_does_not_hide_what_was_used() -> None:
    saved = fixed_settings(config()) | {"sft.patience": 9}  # the default at that time
    assert differing_settings(saved, config()) == ["sft.patience: 9 there, 2 now"]
    assert differing_settings(saved, config(sft={"patience": 9})) == []


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"run_folder": "elsewhere"}, id="folder"),
        pytest.param({"trainer": {"num_steps": 7, "rollouts_every_steps": 3}}, id="length"),
        pytest.param({"checkpoint": {"every_steps": 7, "keep_last": None}}, id="retention"),
        pytest.param({"metrics": {"wandb": {}, "tensorboard": True}}, id="logging"),
        pytest.param({"evaluation": {"num_samples": 3}}, id="evaluation"),
        pytest.param({"policy": {"parallel": {"data_parallel_size": 2}}}, id="layout"),
        pytest.param({"policy": {"recompute": "full"}}, id="recomputation"),
        pytest.param({"policy": {"head": {"memory_gb": 0.5}}}, id="memory of the head"),
        pytest.param({"batch": {"stream_tokens": 50_000}}, id="length of streams"),
        pytest.param({"reward": {"num_workers": 3}}, id="workers"),
        pytest.param(
            {"policy": {"optimizer": {"use_distributed_optimizer": True}}}, id="optimizer's shards"
        ),
        pytest.param({"rollout": {"engine": "transformers"}}, id="engine"),
        pytest.param({"rollout": {"sglang": {"max_retries": 5, "urls": ["http://x"]}}}, id="urls"),
        pytest.param({"rollout": {"sglang": {"num_servers": 4, "min_servers": 2}}}, id="servers"),
        pytest.param({"policy": {"experts": {"implementation": "grouped"}}}, id="experts"),
        pytest.param({"model": {"path": "elsewhere"}}, id="place of the model"),
        pytest.param({"data": {"problems": "p.jsonl", "held_out": {}}}, id="held-out problems"),
    ],
)
def test_what_decides_only_how_and_where_may_change(changes: dict[str, Any]) -> None:
    assert differing_settings(fixed_settings(config()), config(**changes)) == []
    assert settings_hash(config(**changes)) == settings_hash(config())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"seed": 1}, id="seed"),
        pytest.param({"method": "rl"}, id="method"),
        pytest.param({"policy": {"dtype": "float32"}}, id="precision"),
        pytest.param({"policy": {"optimizer": {"lr": 1e-3}}}, id="learning rate"),
        pytest.param({"loss": {"baseline": "none"}}, id="loss"),
        pytest.param({"batch": {"group_size": 4}}, id="group size"),
    ],
)
def test_what_is_computed_may_not_change(changes: dict[str, Any]) -> None:
    assert len(differing_settings(fixed_settings(config()), config(**changes))) == 1
    assert settings_hash(config(**changes)) != settings_hash(config())


def test_defaults_are_those_of_an_empty_config() -> None:
    defaults = default_settings(PolicyConfig)
    assert defaults == fixed_policy_settings()
    assert default_settings(RunConfig)["model.logits_dtype"] == "float32"
    assert "model.path" not in default_settings(RunConfig)


def fixed_policy_settings() -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in PolicyConfig().model_dump(mode="json").items():
        inner = value if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{name}".rstrip("."): part for name, part in inner.items()}
    return flat


def test_a_checkpoint_without_settings_is_refused() -> None:
    with pytest.raises(ConfigError, match="not saved by this version"):
        check_saved_settings({}, config(), where="step-000004")


def test_other_settings_are_refused_by_name() -> None:
    state = describe_settings(config())
    check_saved_settings(state, config(), where="step-000004")
    with pytest.raises(ConfigError, match=r"step-000004: .*\n  seed: 0 there, 1 now\n"):
        check_saved_settings(state, config(seed=1), where="step-000004")


def test_the_run_folder_is_a_path_that_json_knows() -> None:
    assert isinstance(config().run_folder, Path)
    assert fixed_settings(config())["data.problems"] == "p.jsonl"
