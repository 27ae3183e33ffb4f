"""Which servers there are: child processes or URLs, and what does not go together."""

from typing import Any

import pytest

from prefixrl_mcore.config.base import ConfigError, validate
from prefixrl_mcore.config.rollout import RolloutConfig


def servers(**settings: Any) -> RolloutConfig:
    return validate(RolloutConfig, {"sglang": settings}, where="test")


def test_members_are_the_urls_or_the_child_processes() -> None:
    assert servers().sglang.num_members == 1
    assert servers(num_servers=3).sglang.num_members == 3
    assert servers(urls=["http://a", "http://b"], min_servers=2).sglang.num_members == 2


def test_more_servers_may_be_wanted_than_one_machine_starts() -> None:
    config = servers(num_servers=2, min_servers=3).sglang
    config.check_min_servers(3)
    with pytest.raises(ConfigError, match="got 3 > 2; lower it, or have more servers"):
        config.check_min_servers(2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(
            {"num_servers": 2, "urls": ["http://a"]}, "leave one of them out", id="both kinds"
        ),
        pytest.param({"urls": ["http://a", "http://a"]}, "names a server twice", id="twice"),
        pytest.param({"router_url": "http://r"}, "the servers behind the router", id="router only"),
        pytest.param(
            {"urls": ["http://a", "http://b"], "min_servers": 3}, "got 3 > 2", id="too few URLs"
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        servers(**settings)


def test_colocated_is_refused_where_nobody_can_take_turns() -> None:
    settings = {"schedule": {"overlap": True, "max_staleness": 1}}
    validate(RolloutConfig, settings, where="test")
    with pytest.raises(ConfigError, match="switch one of them off: overlap needs servers on GPUs"):
        validate(RolloutConfig, {"colocated": True, **settings}, where="test")


def test_servers_that_run_already_may_share_the_trainers_gpus() -> None:
    both = {"colocated": True, "sglang": {"urls": ["http://a", "http://b"]}}
    assert validate(RolloutConfig, both, where="test").sglang.num_members == 2
