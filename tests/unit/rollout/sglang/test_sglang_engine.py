import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError, RolloutError, SampleRequest, SamplingParams
from prefixrl_mcore.rollout.sglang.engine import SGLangEngine
from tests.support.fake_sglang import SAMPLED_LOGPROB, SAMPLED_TOKEN, Answer, FakeSGLang, serve
from tests.support.tiny_models import EOS_ID, VOCABULARY, build_tiny_qwen3, write_tiny_qwen3
from tests.support.waiting import once


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model"))


@pytest.fixture
def fake(request: pytest.FixtureRequest) -> FakeSGLang:
    """A server; with sessions where a test is parametrized with True."""
    return FakeSGLang(has_sessions=getattr(request, "param", False))


@pytest.fixture
def engine(fake: FakeSGLang, model_folder: Path, tmp_path: Path) -> Iterator[SGLangEngine]:
    with serve(fake) as url:
        engine = SGLangEngine(
            model_folder,
            SGLangConfig(urls=(url,), max_retries=2, start_timeout_seconds=60),
            logits_dtype="float32",
            max_total_tokens=100,
            logs_folder=tmp_path,
        )
        yield engine
        engine.close()


def request_of(name: str = "r", num_samples: int = 2) -> SampleRequest:
    return SampleRequest(
        request_id=name, context_token_ids=(5, 6, 7), num_samples=num_samples, seed=0
    )


def params_of(stop_token_ids: tuple[int, ...] = (EOS_ID,)) -> SamplingParams:
    return SamplingParams(
        temperature=0.5, max_completion_tokens=6, max_total_tokens=50, stop_token_ids=stop_token_ids
    )


def weights() -> list[tuple[str, torch.Tensor]]:
    return [(name, weight.detach()) for name, weight in build_tiny_qwen3().named_parameters()]


def test_answers_become_completions(engine: SGLangEngine) -> None:
    ((first, second),) = engine.sample([request_of()], params_of())

    assert first == second
    assert first.token_ids == (SAMPLED_TOKEN,) * 6
    assert first.logprobs == (SAMPLED_LOGPROB,) * 6
    assert (first.finish_reason, first.policy_version) == ("length", -1)
    assert engine.name == "sglang 0.5.17"


def test_lost_answers_are_asked_for_again(
    engine: SGLangEngine, fake: FakeSGLang, caplog: pytest.LogCaptureFixture
) -> None:
    fake.num_dropped_answers = 2

    with caplog.at_level(logging.WARNING):
        groups = engine.sample([request_of("a"), request_of("b")], params_of())

    assert [len(group) for group in groups] == [2, 2]
    assert "request 'a' was lost, attempt 2 follows" in caplog.text
    assert engine.take_metrics()["engine/num_reissued_requests"] == 2


def test_answer_that_stays_lost_is_an_error_with_the_request_id(
    engine: SGLangEngine, fake: FakeSGLang
) -> None:
    fake.num_dropped_answers = 99

    # Twice, then once more by the death that three failures in a row are, then once too often.
    with pytest.raises(
        RolloutError, match=r"request 'gone' was lost after 4 attempts \(1 by a serv"
    ):
        engine.sample([request_of("gone")], params_of())
    assert fake.calls.count("/generate") == 4


def test_refused_request_is_not_asked_for_again(engine: SGLangEngine, fake: FakeSGLang) -> None:
    fake.refuse_generate = "too long"

    with pytest.raises(RolloutError, match=r"'r' was refused: /generate answered 400: .*too long"):
        engine.sample([request_of("r")], params_of())
    assert fake.calls.count("/generate") == 1


def test_server_that_somebody_else_updated_gets_our_weights_before_it_samples(
    engine: SGLangEngine, fake: FakeSGLang, caplog: pytest.LogCaptureFixture
) -> None:
    engine.load_weights(lambda: iter(weights()), 3)
    fake.weight_version = "someone else's"

    (group,) = engine.sample([request_of()], params_of())

    assert 'has weights "someone else\'s", expected' in caplog.text
    assert len(fake.sampled) == 1
    assert {one.policy_version for one in group} == {3}


def test_sample_of_weights_that_change_all_the_time_is_refused(
    engine: SGLangEngine, fake: FakeSGLang
) -> None:
    def say_others(answer: Answer) -> None:
        answer["meta_info"]["weight_version"] = "someone else's"

    fake.spoil = say_others

    with pytest.raises(RolloutError, match='sampled with weights "someone else\'s", expected'):
        engine.sample([request_of()], params_of())


@pytest.mark.parametrize("fake", [False, True], indirect=True)
def test_weights_are_sent_whole_and_the_cache_is_flushed_with_the_last_of_them(
    engine: SGLangEngine, fake: FakeSGLang
) -> None:
    fake.calls.clear()

    engine.load_weights(lambda: iter(weights()), 3)

    assert fake.loaded == {name: list(weight.shape) for name, weight in weights()}
    assert not fake.is_session_open
    assert fake.is_cache_fresh
    assert ("/end_weight_update" in fake.calls) == fake.has_sessions
    assert engine.sample([request_of()], params_of())[0][0].policy_version == 3


@pytest.mark.parametrize("fake", [True], indirect=True)
def test_session_that_a_killed_trainer_left_open_is_ended(
    engine: SGLangEngine, fake: FakeSGLang
) -> None:
    fake.is_session_open = True

    engine.load_weights(lambda: iter(weights()), 3)

    assert engine.policy_version == 3
    assert not fake.is_session_open


def test_incomplete_weights_are_never_sampled_from(engine: SGLangEngine, fake: FakeSGLang) -> None:
    fake.has_sessions = True
    fake.calls.clear()
    with pytest.raises(EngineError, match="did not come"):
        engine.load_weights(lambda: iter(weights()[:-1]), 3)

    assert engine.policy_version == -1
    assert fake.weight_version.endswith(":3:incomplete")
    assert "/end_weight_update" not in fake.calls
    assert "/continue_generation" not in fake.calls
    with pytest.raises(EngineError, match="its weights are incomplete"):
        engine.sample([request_of()], params_of())

    engine.load_weights(lambda: iter(weights()), 4)
    assert fake.weight_version.endswith(":4")
    assert not fake.is_session_open
    assert engine.sample([request_of()], params_of())[0][0].policy_version == 4


def test_restarted_server_gets_the_weights_again(engine: SGLangEngine, fake: FakeSGLang) -> None:
    engine.load_weights(lambda: iter(weights()), 3)
    fake.loaded.clear()
    fake.weight_version = "those of the folder"
    fake.num_dropped_answers = 1

    (group,) = engine.sample([request_of()], params_of())

    assert {one.policy_version for one in group} == {3}
    assert len(fake.loaded) == len(weights())


def test_stop_tokens_must_include_the_models_own(engine: SGLangEngine) -> None:
    with pytest.raises(ValueError, match=r"also stops at the model's end tokens \[2\]"):
        engine.sample([request_of()], params_of(stop_token_ids=(9,)))


def test_completion_past_the_models_positions_is_refused(engine: SGLangEngine) -> None:
    params = SamplingParams(
        temperature=1.0, max_completion_tokens=9999, max_total_tokens=9999, stop_token_ids=()
    )

    with pytest.raises(ValueError, match="the model has 4096 positions"):
        engine.sample([request_of()], params)


def _shorten(answer: Answer) -> None:
    answer["output_ids"].pop()
    answer["meta_info"]["output_token_logprobs"].pop()


def _not_a_number(answer: Answer) -> None:
    answer["meta_info"]["output_token_logprobs"][1][0] = float("nan")


def _other_ids(answer: Answer) -> None:
    answer["output_ids"][0] += 1


def _token_of_no_vocabulary(answer: Answer) -> None:
    answer["output_ids"][0] = len(VOCABULARY)
    answer["meta_info"]["output_token_logprobs"][0][1] = len(VOCABULARY)


def _false_stop(answer: Answer) -> None:
    answer["meta_info"]["finish_reason"] = {"type": "stop", "matched": EOS_ID}


def _no_logprobs(answer: Answer) -> None:
    del answer["meta_info"]["output_token_logprobs"]


def _two_spans(answer: Answer) -> None:
    answer["meta_info"]["weight_versions"] = [["first", 3], ["first", 3]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(_shorten, "cut off after 5 of 6 tokens", id="short"),
        pytest.param(_not_a_number, "logprob nan of completion token 1", id="nan"),
        pytest.param(_other_ids, "do not match", id="ids"),
        pytest.param(_token_of_no_vocabulary, f"token id {len(VOCABULARY)} came", id="vocabulary"),
        pytest.param(_false_stop, r"expected a last token out of \[2\]", id="stop"),
        pytest.param(_two_spans, "sampled with weights", id="mixed weights"),
        pytest.param(_no_logprobs, "not an answer of SGLang's", id="no logprobs"),
    ],
)
def test_answer_that_does_not_fit_the_request_is_refused_by_name(
    engine: SGLangEngine, fake: FakeSGLang, spoil: object, message: str
) -> None:
    fake.spoil = spoil  # pyright: ignore[reportAttributeAccessIssue] -- one of the above

    with pytest.raises(RolloutError, match=f"request 'odd' on server 0: .*{message}"):
        engine.sample([request_of("odd")], params_of())


def test_end_token_in_the_last_place_counts_as_a_stop(
    engine: SGLangEngine, fake: FakeSGLang
) -> None:
    def end_last(answer: Answer) -> None:
        answer["output_ids"][-1] = EOS_ID
        answer["meta_info"]["output_token_logprobs"][-1][1] = EOS_ID

    fake.spoil = end_last

    (group,) = engine.sample([request_of()], params_of())

    assert [one.finish_reason for one in group] == ["length", "stop"]


def test_server_that_cannot_be_reached_is_an_error(model_folder: Path, tmp_path: Path) -> None:
    config = SGLangConfig(urls=("http://127.0.0.1:9",), start_timeout_seconds=0.1)

    with pytest.raises(EngineError, match=r"no healthy server at http://127\.0\.0\.1:9"):
        SGLangEngine(
            model_folder,
            config,
            logits_dtype="float32",
            max_total_tokens=100,
            logs_folder=tmp_path,
        )


def test_server_that_dies_while_it_starts_is_reported_with_its_log(
    model_folder: Path, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such module: sglang >&2\nexit 3\n")
    python.chmod(0o755)

    with pytest.raises(EngineError, match=r"(?s)died while it started.*\| no such module: sglang"):
        SGLangEngine(
            model_folder,
            SGLangConfig(python=python),
            logits_dtype="float32",
            max_total_tokens=100,
            logs_folder=tmp_path / "logs",
        )


def test_payload_leaves_no_parameter_to_the_models_defaults(
    engine: SGLangEngine, fake: FakeSGLang
) -> None:
    payloads: list[Answer] = []
    answer = fake.answer

    def keep(path: str, payload: Answer) -> tuple[int, object]:
        if path == "/generate":  # a health check may come before it or after
            payloads.append(json.loads(json.dumps(payload)))
        return answer(path, payload)

    fake.answer = keep
    engine.sample([request_of(num_samples=3)], params_of())

    (payload,) = payloads
    parameters = payload["sampling_params"]
    assert payload["input_ids"] == [[5, 6, 7]] * 3
    assert (parameters["n"], parameters["max_new_tokens"], parameters["temperature"]) == (1, 6, 0.5)
    assert (parameters["top_p"], parameters["top_k"], parameters["min_p"]) == (1.0, -1, 0.0)
    assert (parameters["stop_token_ids"], parameters["ignore_eos"]) == ([EOS_ID], False)

    engine.sample([request_of()], params_of(stop_token_ids=()))

    assert payloads[-1]["sampling_params"]["ignore_eos"]


@pytest.mark.parametrize("change", ["pause", "resume", "sleep", "wake"])
def test_engine_that_samples_is_not_changed_by_another_thread(
    engine: SGLangEngine, fake: FakeSGLang, change: str
) -> None:
    fake.hold = threading.Event()
    messages: list[str] = []

    def change_it() -> None:
        try:
            getattr(engine, change)()
        except EngineError as error:
            messages.append(str(error))
        assert fake.hold is not None
        fake.hold.set()

    with once(lambda: "/generate" in fake.calls, change_it):
        (group,) = engine.sample([request_of()], params_of())

    assert [len(one.token_ids) for one in group] == [6, 6]
    assert [f"cannot {change} while completions are sampled" in one for one in messages] == [True]
    assert not {"/pause_generation", "/release_memory_occupation weights kv_cache"} & set(
        fake.calls
    )
    assert len(engine.sample([request_of()], params_of())) == 1


def test_server_that_would_keep_its_memory_is_not_put_to_sleep_beside_a_trainer(
    fake: FakeSGLang, model_folder: Path, tmp_path: Path
) -> None:
    fake.precision["device"] = "cuda"  # as /server_info says
    with (
        serve(fake) as url,
        pytest.raises(EngineError, match="start it with --enable-memory-saver"),
    ):
        SGLangEngine(
            model_folder,
            SGLangConfig(urls=(url,), start_timeout_seconds=60, dtype="float32"),
            logits_dtype="float32",
            max_total_tokens=100,
            logs_folder=tmp_path,
            device="cuda",
            colocated=True,
        )


def test_closed_engine_stays_closed(engine: SGLangEngine) -> None:
    engine.close()
    for change in (engine.pause, engine.resume, engine.sleep, engine.wake):
        with pytest.raises(EngineError, match="it is closed"):
            change()
    with pytest.raises(EngineError, match="cannot sample: it is closed"):
        engine.sample([request_of()], params_of())
