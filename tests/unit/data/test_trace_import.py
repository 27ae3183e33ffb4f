"""Import of traces made elsewhere: real rows, exact tokens, everything refused is reported."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.config.data import PromptConfig
from prefixrl_mcore.data.import_report import ImportReport
from prefixrl_mcore.data.problems import read_problems
from prefixrl_mcore.data.prompts import PromptRenderer
from prefixrl_mcore.data.trace_import import import_traces
from prefixrl_mcore.data.traces import TraceRecord, TraceStore
from prefixrl_mcore.data.verification import verify_store
from prefixrl_mcore.records import Problem
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.fake_verifier import FakeVerifier
from tests.support.tiny_models import build_tiny_tokenizer

FIXTURES = Path(__file__).parents[2] / "fixtures"
END = 258
"""End token of the test tokenizer with one merge."""

PROBLEMS = [
    Problem(problem_id="p0", text="6 * 7 ?", answer="42"),
    Problem(problem_id="p1", text="1 + 1 ?", answer="2"),
]


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> PromptRenderer:
    # The merge of "o" and "l" would span the boundary of "So" and "lved" if both were joined.
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder, merges=(("o", "l"),))
    return PromptRenderer(folder, PromptConfig(style="text", template="{problem} So"))


@pytest.fixture
def store(tmp_path: Path, renderer: PromptRenderer) -> TraceStore:
    return TraceStore.create(
        tmp_path / "store",
        tokenizer_hash=renderer.tokenizer_hash,
        chat_template_hash=renderer.chat_template_hash,
        model="tiny",
    )


def _import(
    store: TraceStore,
    renderer: PromptRenderer,
    rows: Sequence[Mapping[str, object]] | Path,
    **options: Any,
) -> ImportReport:
    path = rows if isinstance(rows, Path) else store.folder.parent / "traces.jsonl"
    if not isinstance(rows, Path):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments: dict[str, Any] = {
        "file_format": "jsonl",
        "source_model": "other-model",
        "problems": PROBLEMS,
        "verifier": FakeVerifier(),
    }
    return import_traces(path, store=store, renderer=renderer, **(arguments | options))


def _stored(store: TraceStore) -> list[TraceRecord]:
    return list(TraceStore.open(store.folder).traces())


def _reasons(report: ImportReport) -> list[str]:
    return [rejection.reason for rejection in report.rejections]


def test_a_text_is_tokenised_by_itself_right_after_the_prompt(
    store: TraceStore, renderer: PromptRenderer
) -> None:
    report = _import(store, renderer, [{"problem_id": "p0", "text": "lved A: 42"}])
    (record,) = _stored(store)
    assert record.prompt_token_ids == renderer.render(PROBLEMS[0]).token_ids
    assert record.completion_token_ids == (*renderer.encode_continuation("lved A: 42"), END)
    joined = renderer.encode_continuation("6 * 7 ? Solved A: 42")
    assert record.prompt_token_ids + record.completion_token_ids != (*joined, END)
    assert renderer.completion_text(record.completion_token_ids) == "lved A: 42"
    assert (record.sampler, record.source_model) == ("import", "other-model")
    assert (record.finish_reason, record.policy_version, record.label) == ("stop", -1, None)
    assert (record.verifier, record.rollout_logprobs) == ("fake 1.0", ())
    assert (record.temperature, record.seed) == (None, None)
    assert (report.num_candidates, report.num_accepted, report.rejections) == (1, 1, ())
    assert report.label_agreement is None


def test_token_ids_are_stored_as_they_are(store: TraceStore, renderer: PromptRenderer) -> None:
    token_ids = [*renderer.encode_continuation("so A: 42"), END]
    row = {
        "problem": "6 * 7 ?",
        "token_ids": token_ids,
        "rollout_logprobs": [-0.5] * len(token_ids),
        "source_model": "own-name",
        "temperature": 0.7,
        "seed": 3,
        "num_tries": 5,
        "flops": 1e9,
        "seconds": 2,
        "is_correct": True,
        "tokenizer_hash": renderer.tokenizer_hash,
    }
    report = _import(store, renderer, [row], source_model=None)
    (record,) = _stored(store)
    assert record.completion_token_ids == tuple(token_ids)
    assert record.rollout_logprobs == (-0.5,) * len(token_ids)
    assert (record.source_model, record.temperature, record.seed) == ("own-name", 0.7, 3)
    assert (record.num_tries, record.flops, record.seconds) == (5, 1e9, 2.0)
    assert record.label is True
    assert report.label_agreement == 1.0
    (attempt,) = store.attempts()
    assert (attempt.num_tries, attempt.flops, attempt.is_solved) == (5, 1e9, True)


def test_a_trace_that_was_cut_off_gets_no_end_token(
    store: TraceStore, renderer: PromptRenderer
) -> None:
    row = {"problem_id": "p0", "text": "A: 42", "finish_reason": "length"}
    verifier = FakeVerifier()
    _import(store, renderer, [row], verifier=verifier)
    (record,) = _stored(store)
    assert record.completion_token_ids == renderer.encode_continuation("A: 42")
    assert not verifier.requests[0].has_stopped
    assert verifier.requests[0].completion_text == "A: 42"
    assert verifier.requests[0].prefix_text == ""


def test_a_text_that_writes_its_end_token_gets_no_second_one(
    store: TraceStore, renderer: PromptRenderer
) -> None:
    _import(store, renderer, [{"problem_id": "p0", "text": "A: 42<|end|>"}])
    (record,) = _stored(store)
    assert record.completion_token_ids == (*renderer.encode_continuation("A: 42"), END)


def test_texts_that_a_lossy_tokenizer_changes_are_counted(tmp_path: Path) -> None:
    build_tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    config = PromptConfig(style="text", template="{problem} :")
    renderer = PromptRenderer(tmp_path / "tokenizer", config)
    store = TraceStore.create(
        tmp_path / "store",
        tokenizer_hash=renderer.tokenizer_hash,
        chat_template_hash=renderer.chat_template_hash,
        model="tiny",
    )
    rows = [{"problem_id": "p0", "text": text} for text in ("1 + 2", "1  + 2", "1 plus 2")]
    report = _import(store, renderer, rows)
    assert report.num_inexact_texts == 2


def test_every_refusal_is_reported_with_place_and_reason(
    store: TraceStore, renderer: PromptRenderer
) -> None:
    rows = [
        {"problem_id": "nobody", "text": "A: 42"},
        {"problem": "no such text", "text": "A: 42"},
        {"problem_id": "p0", "text": "a<|end|>A: 42"},
        {"problem_id": "p0", "token_ids": [259, END]},
        {"problem_id": "p0", "token_ids": [-1, END]},
        {"problem_id": "p0", "text": "x" * 100 + "A: 42"},
        {"problem_id": "p0", "text": "A: 41"},
        {"problem_id": "p0", "text": "no idea"},
        {"problem_id": "p0", "text": "A: 42"},
        {"problem_id": "p0", "text": "A: 42"},
        {"problem_id": "p0", "text": "again A: 42"},
        {"problem_id": "p1", "text": "A: 2"},
    ]
    report = _import(store, renderer, rows, max_total_tokens=60)
    assert _reasons(report) == [
        *("unknown_problem", "unknown_problem", "stop_token_inside"),
        *("token_out_of_range", "token_out_of_range", "too_long"),
        *("verifier:wrong", "verifier:no_answer", "duplicate", "already_solved"),
    ]
    lines = [rejection.where.rsplit(" ", 1)[1] for rejection in report.rejections]
    assert lines == ["1", "2", "3", "4", "5", "6", "7", "8", "10", "11"]
    assert report.rejections[2].problem_id == "p0"
    assert report.reasons["unknown_problem"] == 2
    assert (report.num_candidates, report.num_accepted) == (12, 2)
    assert [record.problem_id for record in _stored(store)] == ["p0", "p1"]
    costs = {attempt.problem_id: attempt.num_tries for attempt in store.attempts()}
    assert costs == {"p0": 9, "p1": 1}


def test_keep_all_keeps_every_verified_trace_but_no_duplicates(
    store: TraceStore, renderer: PromptRenderer
) -> None:
    rows = [{"problem_id": "p0", "text": f"{i % 3} A: 42"} for i in range(4)]
    report = _import(store, renderer, rows, keep="all")
    assert (report.num_accepted, _reasons(report)) == (3, ["duplicate"])


def test_importing_a_file_again_adds_no_trace_and_no_cost(
    store: TraceStore, renderer: PromptRenderer
) -> None:
    rows: list[dict[str, object]] = [
        {"problem_id": "p0", "text": "A: 42", "flops": 5.0},
        {"problem_id": "p0", "text": "so A: 42", "flops": 5.0},
        {"problem_id": "p1", "text": "A: 3", "flops": 7.0},
    ]
    _import(store, renderer, rows)
    before = (store.attempts(), _stored(store))
    report = _import(store, renderer, rows)
    assert _reasons(report) == ["duplicate", "already_solved", "verifier:wrong"]
    assert (store.attempts(), _stored(store)) == before
    # With other options the file may add traces, still without charging it twice.
    report = _import(store, renderer, rows, keep="all")
    assert report.num_accepted == 1
    assert store.total_flops() == 17.0
    assert [a.is_solved for a in store.attempts()] == [True, False]


def test_labels_are_compared_with_verdicts(store: TraceStore, renderer: PromptRenderer) -> None:
    rows: list[dict[str, object]] = [
        {"problem_id": "p0", "text": "A: 42", "is_correct": True},
        {"problem_id": "p0", "text": "A: 41", "is_correct": False},
        {"problem_id": "p0", "text": "A: 42.0", "is_correct": True},
        {"problem_id": "p0", "text": "again A: 42", "is_correct": False},
        {"problem_id": "p0", "text": "more A: 42"},
    ]
    report = _import(store, renderer, rows)
    assert (report.num_labelled, report.label_agreement) == (4, 0.5)
    assert [(d.label, d.reason, d.extracted, d.answer) for d in report.disagreements] == [
        (True, "wrong", "42.0", "42"),
        (False, "correct", "42", "42"),
    ]
    assert report.disagreements[0].where.endswith("line 3")


def test_the_published_gsm8k_solutions(
    store: TraceStore, renderer: PromptRenderer, tmp_path: Path
) -> None:
    lines = (FIXTURES / "gsm8k_model_solutions_head.jsonl").read_bytes().splitlines(keepends=True)
    path = tmp_path / "solutions.jsonl"
    path.write_bytes(b"".join(lines[:3]))
    problems = read_problems(
        FIXTURES / "gsm8k_test_head.jsonl",
        id_field=None,
        text_field="question",
        answer_field="answer",
        answer_format="gsm8k",
        max_problems=3,
    )
    report = _import(
        store,
        renderer,
        path,
        file_format="gsm8k_solutions",
        problems=problems,
        source_model=None,
    )
    assert (report.num_candidates, report.num_labelled) == (12, 12)
    assert report.disagreements == ()
    assert report.reasons == {"verifier:wrong": 8, "already_solved": 2}
    records = _stored(store)
    assert [record.source_model for record in records] == ["175b_verification", "6b_finetuning"]
    text = renderer.completion_text(records[0].completion_token_ids)
    assert text.startswith("Janet eats 3 duck eggs for breakfast and bakes 4 into muffins so 3 + 4")
    assert "3 + 4 = 7 duck eggs are used" in text  # 3 + 4 = <<3+4=7>>7 in the file
    assert text.endswith("\nA: 18")


def test_fields_without_meaning_are_counted(store: TraceStore, renderer: PromptRenderer) -> None:
    rows = [{"problem_id": "p0", "text": "A: 42", "note": 1}, {"problem_id": "p1", "text": "A: 2"}]
    assert _import(store, renderer, rows).ignored_fields == {"note": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        pytest.param({"text": "x"}, "'problem_id' and 'problem', got neither", id="no-problem"),
        pytest.param(
            {"problem_id": "p0", "problem": "x", "text": "x"}, "got both", id="two-problems"
        ),
        pytest.param({"problem_id": "p0"}, "'text' and 'token_ids', got neither", id="no-text"),
        pytest.param({"problem_id": "p0", "text": ""}, "'text' must be a non-empty", id="empty"),
        pytest.param({"problem_id": "p0", "token_ids": []}, "non-empty list of int", id="no-ids"),
        pytest.param({"problem_id": "p0", "token_ids": [1, True]}, "list of int", id="bool-ids"),
        pytest.param({"problem_id": "p0", "token_ids": [1.0]}, "list of int", id="float-ids"),
        pytest.param(
            {"problem_id": "p0", "token_ids": [1, 2], "rollout_logprobs": [-1.0]},
            "must be 2 numbers, one per token id",
            id="logprobs",
        ),
        pytest.param(
            {"problem_id": "p0", "text": "x", "rollout_logprobs": [-1.0]},
            "must be 0 numbers",
            id="logprobs-of-text",
        ),
        pytest.param(
            {"problem_id": "p0", "text": "x", "finish_reason": "eos"}, "one of stop", id="finish"
        ),
        pytest.param({"problem_id": "p0", "text": "x", "is_correct": 1}, "type bool", id="label"),
        pytest.param({"problem_id": "p0", "text": "x", "num_tries": 0}, "at least 1", id="tries"),
        pytest.param({"problem_id": "p0", "text": "x", "flops": -1}, "at least 0", id="flops"),
        pytest.param({"problem_id": "p0", "text": "x", "seed": "a"}, "type int", id="seed"),
        pytest.param(
            {"problem_id": "p0", "text": "x", "tokenizer_hash": "other"},
            "made with tokenizer other, this run has",
            id="tokenizer",
        ),
    ],
)
def test_malformed_files_are_refused_and_nothing_is_stored(
    store: TraceStore, renderer: PromptRenderer, row: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=f"line 2.*{message}"):
        _import(store, renderer, [{"problem_id": "p0", "text": "A: 42"}, row])
    assert _stored(store) == []


def test_a_missing_source_is_refused(store: TraceStore, renderer: PromptRenderer) -> None:
    with pytest.raises(ValueError, match=r"line 1: no source_model; .* --source"):
        _import(store, renderer, [{"problem_id": "p0", "text": "x"}], source_model=None)


def test_ambiguous_problem_texts_are_refused_only_if_they_are_used(
    store: TraceStore, renderer: PromptRenderer
) -> None:
    problems = [*PROBLEMS, Problem(problem_id="twin", text="1 + 1 ?", answer="2")]
    row = {"problem": "1 + 1 ?", "text": "A: 2"}
    with pytest.raises(ValueError, match="problems 'p1' and 'twin' have the same text"):
        _import(store, renderer, [row], problems=problems)
    row = {"problem": "6 * 7 ?", "text": "A: 42"}
    assert _import(store, renderer, [row], problems=problems).num_accepted == 1


def test_a_store_of_another_template_is_refused(
    store: TraceStore, renderer: PromptRenderer, tmp_path: Path
) -> None:
    other = TraceStore.create(
        tmp_path / "other",
        tokenizer_hash=renderer.tokenizer_hash,
        chat_template_hash="x",
        model="tiny",
    )
    with pytest.raises(ValueError, match="was made with chat template x, this run has"):
        _import(other, renderer, [{"problem_id": "p0", "text": "A: 42"}])


def test_unknown_options_are_refused(store: TraceStore, renderer: PromptRenderer) -> None:
    row = {"problem_id": "p0", "text": "x"}
    with pytest.raises(ValueError, match=r"trace format must be .* got 'csv'"):
        _import(store, renderer, [row], file_format="csv")
    with pytest.raises(ValueError, match="keep must be first or all, got 'best'"):
        _import(store, renderer, [row], keep="best")
    with pytest.raises(ValueError, match="is this the file of model solutions"):
        _import(store, renderer, [{"question": "x"}], file_format="gsm8k_solutions")


def test_a_store_can_be_verified_again(store: TraceStore, renderer: PromptRenderer) -> None:
    rows = [{"problem_id": "p0", "text": "A: 42"}, {"problem_id": "p1", "text": "A: 2"}]
    _import(store, renderer, rows)
    report = verify_store(store, PROBLEMS, FakeVerifier(), renderer)
    assert (report.num_traces, report.num_verified, report.failures) == (2, 2, ())
    changed = [Problem(problem_id="p0", text="6 * 7 ?", answer="43")]
    report = verify_store(store, changed, FakeVerifier(), renderer)
    assert (report.verifier, report.num_verified) == ("fake 1.0", 0)
    assert report.reasons == {"wrong": 1, "unknown_problem": 1}
    failure = report.failures[0]
    assert (failure.problem_id, failure.answer, failure.extracted) == ("p0", "43", "42")
    assert failure.trace_id == _stored(store)[0].trace_id
