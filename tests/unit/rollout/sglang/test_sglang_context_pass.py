"""The pass over a group's context: asked for first, counted once, never lost without a word."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.records import Completion
from prefixrl_mcore.rollout.engine import SampleRequest, SamplingParams
from prefixrl_mcore.rollout.interruption import SamplingInterrupted
from prefixrl_mcore.rollout.sglang.context_pass import read_context_pass, with_context_pass
from prefixrl_mcore.rollout.sglang.engine import SGLangEngine
from prefixrl_mcore.rollout.sglang.faults import BadAnswer, ServerLost
from tests.support.fake_sglang import FakeSGLang, serve
from tests.support.tiny_models import write_tiny_qwen3

PARAMS = SamplingParams(
    temperature=1.0, max_completion_tokens=6, max_total_tokens=50, stop_token_ids=()
)
REQUEST = SampleRequest(
    request_id="r", context_token_ids=tuple(range(5, 15)), num_samples=4, seed=0
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model"))


@pytest.fixture
def fake() -> Iterator[FakeSGLang]:
    fake = FakeSGLang()
    fake.has_prefix_cache = True
    with serve(fake):
        yield fake
        if fake.hold is not None:
            fake.hold.set()


def engine_on(fake: FakeSGLang, model_folder: Path, **settings: Any) -> SGLangEngine:
    return SGLangEngine(
        model_folder,
        SGLangConfig(urls=(fake.url,), start_timeout_seconds=60),
        logits_dtype="float32",
        max_total_tokens=100,
        logs_folder=model_folder,
        **settings,
    )


def completion_of(num_cached_tokens: int, num_tokens: int = 2) -> Completion:
    return Completion(
        token_ids=(7,) * num_tokens,
        logprobs=(-1.0,) * num_tokens,
        finish_reason="length" if num_tokens else "abort",
        policy_version=0,
        num_cached_tokens=num_cached_tokens,
    )


def cached_of(completions: list[Completion]) -> list[int]:
    return [one.num_cached_tokens for one in completions]


def payloads_of(fake: FakeSGLang) -> list[dict[str, Any]]:
    """Return what ``/generate`` is given from now on."""
    payloads: list[dict[str, Any]] = []
    answer = fake.answer

    def keep(path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        if path == "/generate":
            payloads.append(json.loads(json.dumps(payload)))
        return answer(path, payload)

    fake.answer = keep  # type: ignore[method-assign]
    return payloads


def test_pass_is_the_first_completions() -> None:
    group = [completion_of(9) for _ in range(4)]

    assert cached_of(with_context_pass(group, 0)) == [9, 9, 9, 9]
    assert cached_of(with_context_pass(group, 1)) == [8, 9, 9, 9]
    assert cached_of(with_context_pass(group, 10)) == [0, 8, 9, 9]


def test_completion_without_tokens_takes_nothing_of_the_pass() -> None:
    group = [completion_of(9, num_tokens=0), completion_of(9), completion_of(9)]

    assert cached_of(with_context_pass(group, 10)) == [9, 0, 8]


def test_pass_computed_what_was_not_cached() -> None:
    meta = {"finish_reason": {"type": "length"}, "cached_tokens": 30}

    assert read_context_pass([{"meta_info": meta}], 100) == 70


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([{"meta_info": {"finish_reason": {"type": "abort"}}}], ServerLost),
        ([{"meta_info": {"finish_reason": {"type": "length"}}}], BadAnswer),
        ([], BadAnswer),
        ([{}], BadAnswer),
    ],
)
def test_pass_that_cannot_be_believed_is_a_fault(
    answers: list[dict[str, Any]], error: type[Exception]
) -> None:
    with pytest.raises(error):
        read_context_pass(answers, 100)


def test_context_is_computed_before_the_samples_and_counted(
    fake: FakeSGLang, model_folder: Path
) -> None:
    engine = engine_on(fake, model_folder)
    payloads = payloads_of(fake)

    (group,) = engine.sample([REQUEST], PARAMS)

    assert [payload["input_ids"] for payload in payloads] == [
        list(range(5, 15)),
        [list(range(5, 15))] * 4,
    ]
    assert payloads[0]["sampling_params"]["max_new_tokens"] == 0
    # 10 tokens in the pass, and the last one again for each of the 4 samples: 14 of 40.
    assert cached_of(group) == [0, 8, 9, 9]
    metrics = engine.take_metrics()
    assert metrics["engine/cache_hit_fraction"] == 26 / 40
    assert metrics["engine/server_0/tokens"] == 14 + 4 * 6
    assert metrics["engine/num_requests"] == 1

    (group,) = engine.sample([REQUEST], PARAMS)  # it is in the cache: one token per pass

    assert cached_of(group) == [8, 9, 9, 9]
    engine.close()


@pytest.mark.parametrize(("has_cache", "num_samples"), [(True, 1), (False, 4)])
def test_no_pass_where_it_saves_nothing(
    fake: FakeSGLang, model_folder: Path, has_cache: bool, num_samples: int
) -> None:
    fake.has_prefix_cache = has_cache
    engine = engine_on(fake, model_folder)
    request = SampleRequest(
        request_id="r", context_token_ids=(5, 6), num_samples=num_samples, seed=0
    )

    engine.sample([request], PARAMS)

    assert fake.calls.count("/generate") == 1
    engine.close()


def test_pass_that_is_lost_is_made_again(fake: FakeSGLang, model_folder: Path) -> None:
    engine = engine_on(fake, model_folder)
    fake.num_dropped_answers = 1

    (group,) = engine.sample([REQUEST], PARAMS)

    assert cached_of(group) == [0, 8, 9, 9]
    assert engine.take_metrics()["engine/num_reissued_requests"] == 1
    engine.close()


def test_samples_are_not_asked_for_after_a_pass_that_was_interrupted(
    fake: FakeSGLang, model_folder: Path
) -> None:
    fake.hold = threading.Event()
    engine = engine_on(fake, model_folder, is_interrupted=lambda: "/generate" in fake.calls)

    with pytest.raises(SamplingInterrupted) as caught:
        engine.sample([REQUEST], PARAMS)

    assert caught.value.num_tokens == 0
    assert fake.calls.count("/generate") == 1
    engine.close()


def test_samples_are_not_asked_for_after_a_pass_that_ended_too_late(
    fake: FakeSGLang, model_folder: Path
) -> None:
    engine = engine_on(fake, model_folder, is_interrupted=lambda: "/generate" in fake.calls)
    is_told = threading.Event()
    answer = fake.answer

    def answer_once_told_to_abort(path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        if path == "/abort_request":
            is_told.set()
        answered = answer(path, payload)
        if path == "/generate":
            is_told.wait(5)
        return answered

    fake.answer = answer_once_told_to_abort  # type: ignore[method-assign]

    with pytest.raises(SamplingInterrupted):
        engine.sample([REQUEST], PARAMS)

    assert fake.calls.count("/generate") == 1
    engine.close()
