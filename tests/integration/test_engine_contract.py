"""What every rollout engine must do; one suite, run against each of them.

The SGLang engine runs on real servers, one at each end of the supported versions: 0.5.17, and one
whose weight updates are sessions. It is skipped where SGLang's environment is missing, and fails
there instead when PREFIXRL_REQUIRE_SGLANG=1.
"""

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefixrl_mcore.config.rollout import RolloutConfig, SGLangConfig, TransformersConfig
from prefixrl_mcore.records import Completion
from prefixrl_mcore.rollout.build import build_engine
from prefixrl_mcore.rollout.engine import EngineError, RolloutEngine, SampleRequest, SamplingParams
from prefixrl_mcore.rollout.interruption import SamplingInterrupted
from prefixrl_mcore.rollout.sglang.engine import SGLangEngine
from tests.support.hf_logprobs import hf_completion_logprobs, hf_greedy_completion
from tests.support.processes import wait_until_gone
from tests.support.server_loads import is_sampling
from tests.support.sglang_environments import sglang_python
from tests.support.tiny_models import EOS_ID, VOCABULARY, write_tiny_qwen3
from tests.support.waiting import is_inside, once

# Both sides compute in float32; they differ in the order of sums, by about 2e-6 nats.
LOGPROB_TOLERANCE = 2e-5

MAX_TOTAL_TOKENS = 1200


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """An engine on model A, and the two models that the suite knows the truth of."""

    engine: RolloutEngine
    model_a: PreTrainedModel
    model_b: PreTrainedModel
    interruption: threading.Event


@pytest.fixture(
    scope="module",
    params=[
        "transformers",
        pytest.param("sglang", marks=pytest.mark.slow),
        pytest.param("sglang-next", marks=pytest.mark.slow),
    ],
)
def setting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setting]:
    is_transformers = request.param == "transformers"
    python = Path() if is_transformers else sglang_python(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    folder_a = write_tiny_qwen3(folder / "a", seed=0)
    folder_b = write_tiny_qwen3(folder / "b", seed=1)
    config = RolloutConfig(
        engine="transformers" if is_transformers else "sglang",
        max_total_tokens=MAX_TOTAL_TOKENS,
        sglang=SGLangConfig(python=python, start_timeout_seconds=300, max_retries=2),
        transformers=TransformersConfig(max_batch_size=16),
    )
    interruption = threading.Event()
    engine = build_engine(
        config,
        folder_a,
        logits_dtype="float32",
        logs_folder=folder / "logs",
        device="cpu",
        is_interrupted=interruption.is_set,
    )
    try:
        yield Setting(
            engine=engine,
            model_a=_load(folder_a),
            model_b=_load(folder_b),
            interruption=interruption,
        )
    finally:
        engine.close()


@pytest.fixture
def engine(setting: Setting) -> RolloutEngine:
    """The engine, with model A loaded as version 0."""
    setting.engine.load_weights(lambda: iter(weights_of(setting.model_a)), 0)
    return setting.engine


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def weights_of(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    return [(name, weight.detach()) for name, weight in model.named_parameters()]


def context_of(seed: int, length: int) -> tuple[int, ...]:
    generator = random.Random(seed)
    return tuple(generator.randrange(4, len(VOCABULARY)) for _ in range(length))


def request_of(seed: int, length: int, num_samples: int = 1) -> SampleRequest:
    return SampleRequest(
        request_id=f"request/{seed}",
        context_token_ids=context_of(seed, length),
        num_samples=num_samples,
        seed=seed,
    )


def params_of(
    *,
    temperature: float = 1.0,
    max_completion_tokens: int = 20,
    max_total_tokens: int = MAX_TOTAL_TOKENS,
    stop_token_ids: tuple[int, ...] = (),
) -> SamplingParams:
    return SamplingParams(
        temperature=temperature,
        max_completion_tokens=max_completion_tokens,
        max_total_tokens=max_total_tokens,
        stop_token_ids=stop_token_ids,
    )


def assert_logprobs_are_those_of(
    model: PreTrainedModel,
    requests: list[SampleRequest],
    groups: list[list[Completion]],
    *,
    temperature: float,
) -> None:
    for request, completions in zip(requests, groups, strict=True):
        for completion in completions:
            expected = hf_completion_logprobs(
                model, request.context_token_ids, completion.token_ids, temperature=temperature
            )
            assert completion.logprobs == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


def test_version_is_minus_one_before_weights_are_loaded(setting: Setting) -> None:
    requests = [request_of(0, 5)]

    groups = setting.engine.sample(requests, params_of())

    assert setting.engine.policy_version == -1
    assert groups[0][0].policy_version == -1
    assert_logprobs_are_those_of(setting.model_a, requests, groups, temperature=1.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_log_softmax_at_the_temperature(
    setting: Setting, engine: RolloutEngine, temperature: float
) -> None:
    requests = [request_of(seed, length, 3) for seed, length in enumerate([1, 7, 30, 31, 200])]

    groups = engine.sample(requests, params_of(temperature=temperature))

    assert_logprobs_are_those_of(setting.model_a, requests, groups, temperature=temperature)


def test_loaded_weights_are_sampled_from_and_stamped(
    setting: Setting, engine: RolloutEngine
) -> None:
    requests = [request_of(seed, 12, 2) for seed in range(4)]

    engine.load_weights(lambda: iter(weights_of(setting.model_b)), 7)
    with_b = engine.sample(requests, params_of())
    engine.load_weights(lambda: iter(weights_of(setting.model_a)), 8)
    with_a = engine.sample(requests, params_of())

    assert_logprobs_are_those_of(setting.model_b, requests, with_b, temperature=1.0)
    assert_logprobs_are_those_of(setting.model_a, requests, with_a, temperature=1.0)
    assert {one.policy_version for group in with_b for one in group} == {7}
    assert {one.policy_version for group in with_a for one in group} == {8}
    assert engine.policy_version == 8


def test_completions_come_in_the_order_of_the_requests(engine: RolloutEngine) -> None:
    # Contexts of falling length, and greedy, so that each request has one right answer.
    requests = [request_of(seed, 40 - 5 * seed, 1 + seed % 3) for seed in range(8)]

    groups = engine.sample(requests, params_of(temperature=0.0))

    assert [len(group) for group in groups] == [1, 2, 3, 1, 2, 3, 1, 2]
    for request, group in zip(requests, groups, strict=True):
        (alone,) = engine.sample([request], params_of(temperature=0.0))
        assert {one.token_ids for one in group} == {alone[0].token_ids}


def test_context_conditions_the_completion(setting: Setting, engine: RolloutEngine) -> None:
    prompt, prefix = context_of(1, 9), context_of(2, 14)
    requests = [
        SampleRequest(request_id=name, context_token_ids=context, num_samples=1, seed=0)
        for name, context in [("without", prompt), ("with", prompt + prefix)]
    ]

    groups = engine.sample(requests, params_of(temperature=0.0, max_completion_tokens=12))

    for request, (completion,) in zip(requests, groups, strict=True):
        expected = hf_greedy_completion(setting.model_a, request.context_token_ids, 12)
        assert completion.token_ids == expected
    assert groups[0][0].token_ids != groups[1][0].token_ids


def test_greedy_logprobs_are_at_temperature_one(setting: Setting, engine: RolloutEngine) -> None:
    requests = [request_of(3, 10)]

    groups = engine.sample(requests, params_of(temperature=0.0))

    assert_logprobs_are_those_of(setting.model_a, requests, groups, temperature=1.0)


def test_stop_token_ends_a_completion_and_belongs_to_it(engine: RolloutEngine) -> None:
    stop = (EOS_ID, 9)
    requests = [request_of(seed, 8, 8) for seed in range(8)]

    groups = engine.sample(requests, params_of(stop_token_ids=stop, max_completion_tokens=30))

    completions = [one for group in groups for one in group]
    assert {one.finish_reason for one in completions} == {"stop", "length"}
    assert {one.token_ids[-1] for one in completions if one.finish_reason == "stop"} == set(stop)
    for one in completions:
        assert not set(stop) & set(one.token_ids[:-1])
        if one.finish_reason == "length":
            assert len(one.token_ids) == 30
            assert one.token_ids[-1] not in stop


def test_without_stop_tokens_nothing_ends_early(engine: RolloutEngine) -> None:
    groups = engine.sample([request_of(0, 8, 16)], params_of(max_completion_tokens=60))

    assert {len(one.token_ids) for one in groups[0]} == {60}
    assert any(EOS_ID in one.token_ids for one in groups[0])


def test_total_length_limits_each_request_by_itself(engine: RolloutEngine) -> None:
    params = params_of(max_completion_tokens=20, max_total_tokens=30)

    groups = engine.sample([request_of(0, 5), request_of(1, 25), request_of(2, 29)], params)

    assert [len(group[0].token_ids) for group in groups] == [20, 5, 1]
    assert {group[0].finish_reason for group in groups} == {"length"}


def test_a_request_can_be_limited_by_itself(engine: RolloutEngine) -> None:
    requests = [request_of(0, 5), dataclasses.replace(request_of(1, 5), max_completion_tokens=7)]

    groups = engine.sample(requests, params_of())

    assert [len(group[0].token_ids) for group in groups] == [20, 7]
    assert groups[1][0].finish_reason == "length"


def test_enough_aborts_what_is_in_flight_and_keeps_its_tokens(
    setting: Setting, engine: RolloutEngine
) -> None:
    short = dataclasses.replace(request_of(7, 8, 2), max_completion_tokens=6)
    requests = [request_of(0, 9, 2), request_of(1, 5), short, request_of(2, 12)]
    asked: list[int] = []
    announced: list[tuple[int, int]] = []

    def is_enough(index: int, completions: list[Completion]) -> bool:
        asked.append(index)
        assert [len(one.token_ids) for one in completions] == [6, 6]
        return True

    params = params_of(max_completion_tokens=1000)
    groups = engine.sample(requests, params, lambda *counts: announced.append(counts), is_enough)

    assert asked == [2]
    assert announced == [(2, 12)]
    assert [len(group) for group in groups] == [2, 1, 2, 1]
    assert [one.finish_reason for one in groups[2]] == ["length"] * 2
    aborted = [one for index in (0, 1, 3) for one in groups[index]]
    assert {one.finish_reason for one in aborted} == {"abort"}
    assert all(len(one.token_ids) < 1000 for one in aborted)
    assert {one.policy_version for group in groups for one in group} == {0}
    assert_logprobs_are_those_of(setting.model_a, requests, groups, temperature=1.0)


def has_begun(engine: RolloutEngine) -> bool:
    """Return whether an engine has sampled first tokens and goes on."""
    if isinstance(engine, SGLangEngine):
        return is_sampling(engine.servers[0].client.url)
    return is_inside("_next_logits")


def test_interrupted_sampling_ends_at_once_and_says_what_is_lost(
    setting: Setting, engine: RolloutEngine
) -> None:
    requests = [request_of(seed, 10, 2) for seed in range(3)]
    params = params_of(max_completion_tokens=1100)
    started = time.monotonic()
    try:
        with (
            once(partial(has_begun, engine), setting.interruption.set),
            pytest.raises(SamplingInterrupted) as caught,
        ):
            engine.sample(requests, params, lambda *_: pytest.fail("a request was finished"))
    finally:
        setting.interruption.clear()

    assert time.monotonic() - started < 60
    assert 0 < caught.value.num_new_tokens < 6 * 1100
    num_contexts, rest = divmod(caught.value.num_tokens - caught.value.num_new_tokens, 10)
    assert rest == 0
    assert 1 <= num_contexts <= 6
    again = engine.sample(requests[:1], params_of())
    assert [len(one.token_ids) for one in again[0]] == [20, 20]


def test_engine_that_samples_is_not_changed(setting: Setting, engine: RolloutEngine) -> None:
    messages: list[str] = []

    def change(*_counts: int) -> None:
        for call in (
            lambda: engine.load_weights(lambda: iter(weights_of(setting.model_b)), 9),
            engine.pause,
            engine.resume,
            engine.sleep,
            engine.wake,
        ):
            with pytest.raises(EngineError) as error:
                call()
            messages.append(str(error.value))

    requests = [request_of(0, 9), request_of(1, 5)]
    groups = engine.sample(requests, params_of(), change)

    verbs = ("load weights", "pause", "resume", "sleep", "wake") * len(requests)
    assert len(messages) == len(verbs)
    for verb, message in zip(verbs, messages, strict=True):
        assert f"cannot {verb} while completions are sampled" in message
    assert engine.policy_version == 0
    assert_logprobs_are_those_of(setting.model_a, requests, groups, temperature=1.0)


def test_what_was_aborted_can_be_continued(setting: Setting, engine: RolloutEngine) -> None:
    short = dataclasses.replace(request_of(7, 8), max_completion_tokens=10)
    request = request_of(0, 9)
    params = params_of(temperature=0.0, max_completion_tokens=1000)
    _, (first,) = engine.sample([short, request], params, is_enough=lambda index, _: index == 0)
    assert first.finish_reason == "abort"

    rest = dataclasses.replace(
        request,
        request_id="the rest",
        context_token_ids=request.context_token_ids + first.token_ids,
        max_completion_tokens=30,
    )
    ((later,),) = engine.sample([rest], params)

    whole = first.continued_by(later)
    expected = hf_greedy_completion(
        setting.model_a, request.context_token_ids, len(first.token_ids) + 30
    )
    assert whole.token_ids == expected
    assert_logprobs_are_those_of(setting.model_a, [request], [[whole]], temperature=1.0)


def test_never_enough_is_to_sample_all(engine: RolloutEngine) -> None:
    requests = [request_of(seed, 10, 2) for seed in range(3)]
    asked: list[int] = []

    def is_enough(index: int, completions: list[Completion]) -> bool:
        asked.append(index)
        return False

    groups = engine.sample(requests, params_of(), is_enough=is_enough)

    assert sorted(asked) == [0, 1, 2]
    assert {one.finish_reason for group in groups for one in group} == {"length"}
    if engine.is_seeded:
        assert groups == engine.sample(requests, params_of())


def test_longest_total_can_be_used_up(engine: RolloutEngine) -> None:
    request = request_of(0, MAX_TOTAL_TOKENS - 300)

    groups = engine.sample([request], params_of(max_completion_tokens=MAX_TOTAL_TOKENS))

    assert len(groups[0][0].token_ids) == 300


@pytest.mark.parametrize(
    ("context", "message"),
    [
        pytest.param((), "context of at least one token", id="empty"),
        pytest.param((5,) * 30, "leaves no room", id="no room"),
        pytest.param((5, len(VOCABULARY)), "token id 32", id="unknown token"),
    ],
)
def test_bad_context_is_refused_by_name(
    engine: RolloutEngine, context: tuple[int, ...], message: str
) -> None:
    request = SampleRequest(
        request_id="the-bad-one", context_token_ids=context, num_samples=1, seed=0
    )

    with pytest.raises(ValueError, match=f"'the-bad-one'.*{message}"):
        engine.sample([request_of(0, 5), request], params_of(max_total_tokens=30))


def test_every_finished_request_is_announced(engine: RolloutEngine) -> None:
    announced: list[tuple[int, int]] = []
    requests = [request_of(seed, 6, 1 + seed) for seed in range(5)]

    engine.sample(requests, params_of(), lambda *counts: announced.append(counts))

    assert sorted(announced) == [(1 + seed, 20 * (1 + seed)) for seed in range(5)]


def test_samples_of_a_request_differ_and_share_the_context(engine: RolloutEngine) -> None:
    (group,) = engine.sample([request_of(40, 50, 8)], params_of())

    assert len({one.token_ids for one in group}) == 8
    # Computed once, and by SGLang its last token again for every sample.
    assert 7 * 49 - 1 <= sum(one.num_cached_tokens for one in group) <= 7 * 50


def test_equal_seeds_give_equal_completions_where_the_engine_says_so(
    engine: RolloutEngine,
) -> None:
    if not engine.is_seeded:
        pytest.skip(f"{engine.name} does not promise it")
    requests = [request_of(seed, 10, 2) for seed in range(3)]

    first = engine.sample(requests, params_of())
    second = engine.sample(requests, params_of())

    assert first == second


def _without_last(weights: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    return weights[:-1]


def _with_unknown(weights: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    return [*weights, ("model.layers.9.mlp.up_proj.weight", torch.zeros(2, 2))]


def _with_other_shape(weights: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    return [(weights[0][0], torch.zeros(3, 3)), *weights[1:]]


def _with_one_twice(weights: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    return [*weights, weights[0]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(_without_last, "did not come: model.norm.weight", id="missing"),
        pytest.param(_with_unknown, "the model has no 'model.layers.9", id="unknown"),
        pytest.param(_with_other_shape, r"shape \[3, 3\], expected \[32, 64\]", id="shape"),
        pytest.param(_with_one_twice, "came twice", id="twice"),
    ],
)
def test_weights_that_do_not_cover_the_model_are_refused(
    setting: Setting,
    engine: RolloutEngine,
    spoil: Callable[[list[tuple[str, torch.Tensor]]], list[tuple[str, torch.Tensor]]],
    message: str,
) -> None:
    with pytest.raises(EngineError, match=message):
        engine.load_weights(lambda: iter(spoil(weights_of(setting.model_b))), 3)

    engine.load_weights(lambda: iter(weights_of(setting.model_b)), 4)
    requests = [request_of(0, 6)]
    groups = engine.sample(requests, params_of())
    assert_logprobs_are_those_of(setting.model_b, requests, groups, temperature=1.0)


def test_tied_head_may_be_sent_under_its_own_name(setting: Setting, engine: RolloutEngine) -> None:
    weights = weights_of(setting.model_b)
    head = ("lm_head.weight", dict(weights)["model.embed_tokens.weight"])

    engine.load_weights(lambda: iter([*weights, head]), 5)

    requests = [request_of(0, 6)]
    groups = engine.sample(requests, params_of())
    assert_logprobs_are_those_of(setting.model_b, requests, groups, temperature=1.0)


def test_paused_engine_refuses_to_sample_until_it_is_resumed(engine: RolloutEngine) -> None:
    engine.pause()
    with pytest.raises(EngineError, match="paused"):
        engine.sample([request_of(0, 5)], params_of())
    engine.resume()

    assert len(engine.sample([request_of(0, 5)], params_of())) == 1


def test_engine_that_slept_needs_weights(setting: Setting, engine: RolloutEngine) -> None:
    engine.sleep()
    engine.wake()
    with pytest.raises(EngineError, match="load_weights"):
        engine.sample([request_of(0, 5)], params_of())

    engine.load_weights(lambda: iter(weights_of(setting.model_b)), 2)
    requests = [request_of(0, 5)]
    groups = engine.sample(requests, params_of())
    assert_logprobs_are_those_of(setting.model_b, requests, groups, temperature=1.0)


def test_killed_server_is_restarted_with_its_weights_and_the_batch_completes(
    setting: Setting, engine: RolloutEngine
) -> None:
    if not isinstance(engine, SGLangEngine):
        pytest.skip(f"{engine.name} runs in this process")
    engine.load_weights(lambda: iter(weights_of(setting.model_b)), 11)
    (server,) = engine.servers
    # The first request is done at once, and the rest then has hundreds of tokens to go.
    requests = [request_of(0, 795), *(request_of(seed, 10, 4) for seed in range(1, 8))]
    is_killed = False

    def kill_once(*_counts: int) -> None:
        nonlocal is_killed
        if not is_killed:
            is_killed = True
            for child in psutil.Process(server.supervisor_pid).children():
                child.kill()

    params = params_of(max_completion_tokens=800, max_total_tokens=800)
    groups = engine.sample(requests, params, kill_once)

    assert engine.servers != [server]
    assert not server.is_alive
    assert [len(group) for group in groups] == [1] + [4] * 7
    assert {len(one.token_ids) for group in groups[1:] for one in group} == {790}
    assert {one.policy_version for group in groups for one in group} == {11}
    for request, group in zip(requests, groups, strict=True):
        assert_logprobs_are_those_of(setting.model_b, [request], [group[:1]], temperature=1.0)


def test_closed_engine_leaves_no_process(setting: Setting) -> None:
    """The last test of the suite: it closes the engine of all others."""
    servers = setting.engine.servers if isinstance(setting.engine, SGLangEngine) else ()
    supervisors = [psutil.Process(server.supervisor_pid) for server in servers]
    families = [[one, *one.children(recursive=True)] for one in supervisors]
    before = [process.pid for family in families for process in family]

    setting.engine.close()
    setting.engine.close()

    with pytest.raises(EngineError, match="closed"):
        setting.engine.sample([request_of(0, 5)], params_of())
    if isinstance(setting.engine, SGLangEngine):
        assert len(before) > 1
    assert wait_until_gone(before) == []
