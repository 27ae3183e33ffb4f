"""What servers are found to be when a pool begins: which are refused, or wait for weights."""

import socket
from typing import Any

import pytest

from prefixrl_mcore.rollout.engine import EngineError
from tests.support.fake_pool import PARAMS, Pool, requests_of, tokens_of, weights


def test_servers_left_in_the_middle_of_an_update_wait_for_weights(pool: Pool) -> None:
    pool.fakes[1].weight_version = "crashed:3:incomplete"
    engine = pool.engine()

    with pytest.raises(EngineError, match="different, incomplete or another"):
        engine.sample(requests_of(1), PARAMS)
    engine.load_weights(weights, 0)

    assert tokens_of(engine.sample(requests_of(3), PARAMS)) == [[6, 6]] * 3


@pytest.mark.parametrize("name", ["ab12:7", "ab12:-1", "0123abcd:400"])
def test_complete_weights_of_another_run_are_not_sampled_from(pool: Pool, name: str) -> None:
    for fake in pool.fakes:
        fake.weight_version = name
    engine = pool.engine()

    with pytest.raises(EngineError, match=r"another run's weights.*call load_weights first"):
        engine.sample(requests_of(1), PARAMS)
    engine.load_weights(weights, 0)

    assert tokens_of(engine.sample(requests_of(3), PARAMS)) == [[6, 6]] * 3


@pytest.mark.parametrize("name", ["initial", "default", "first"])
def test_weights_that_servers_were_started_with_are_sampled_from(pool: Pool, name: str) -> None:
    for fake in pool.fakes:
        fake.weight_version = name

    groups = pool.engine().sample(requests_of(1), PARAMS)

    assert {one.policy_version for group in groups for one in group} == {-1}


def test_servers_left_paused_by_a_trainer_that_died_are_found_and_updated(pool: Pool) -> None:
    for fake in pool.fakes:
        fake.is_paused = True
        fake.weight_version = "ab12:3:incomplete"
    engine = pool.engine()

    engine.load_weights(weights, 0)

    assert tokens_of(engine.sample(requests_of(3), PARAMS)) == [[6, 6]] * 3
    assert [fake.is_paused for fake in pool.fakes] == [False] * 3


def test_where_a_server_is_is_asked_once(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve, asked = socket.getaddrinfo, list[str]()

    def note(host: str, port: Any, *args: Any, **kwargs: Any) -> Any:
        if port is None:  # and not to connect to it
            asked.append(host)
        return resolve("127.0.0.1" if host == "node-a" else host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", note)

    pool.engine(urls=(pool.urls[0].replace("127.0.0.1", "node-a"),))

    assert asked == ["node-a"]


@pytest.mark.parametrize(
    ("reported", "message"),
    [
        ({"tp_size": 2}, r"tp_size = 2, expected 1; set rollout\.sglang\.tensor_parallel_size"),
        ({"pp_size": 2}, r"pp_size = 2, expected 1; start it without --pp-size"),
        ({"dp_size": 4}, r"dp_size = 4, expected 1; .*rollout\.sglang\.urls"),
    ],
)
def test_server_of_other_parallel_sizes_is_refused(
    pool: Pool, reported: dict[str, int], message: str
) -> None:
    pool.fakes[1].precision |= reported

    with pytest.raises(EngineError, match=message):
        pool.engine()


@pytest.mark.parametrize(
    "reported",
    [{"architectures": ["LlamaForCausalLM"]}, {"model_type": "llama"}, {"vocab_size": 7}],
)
def test_server_with_another_kind_of_model_is_refused(pool: Pool, reported: dict[str, Any]) -> None:
    pool.fakes[1].model = reported

    with pytest.raises(EngineError, match=rf"a model with {next(iter(reported))}.*model\.path"):
        pool.engine()


def test_server_that_adds_to_what_requests_say_of_sampling_is_refused(pool: Pool) -> None:
    pool.fakes[1].model = {"preferred_sampling_params": {"min_new_tokens": 5}}

    with pytest.raises(EngineError, match=r"min_new_tokens.* without --preferred-sampling-params"):
        pool.engine()


def test_servers_of_the_folders_model_are_accepted(pool: Pool) -> None:
    for fake in pool.fakes:
        fake.precision |= {"tp_size": 1, "pp_size": 1, "dp_size": 1}
        fake.model = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}

    assert tokens_of(pool.engine().sample(requests_of(1), PARAMS)) == [[6, 6]]


def test_servers_of_different_versions_are_refused(pool: Pool) -> None:
    pool.fakes[2].version = "0.5.19"

    with pytest.raises(EngineError, match=r"0\.5\.1[79], others of the pool are 0\.5\.1[79]"):
        pool.engine()
