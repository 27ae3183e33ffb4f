"""An evaluation that knows some of its results samples the others, as if it knew none."""

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.eval.ending import exits_at_signals
from prefixrl_mcore.eval.runner import Evaluator, StartResult, StartResults
from prefixrl_mcore.records import PrefixedProblem, Problem
from prefixrl_mcore.rollout.engine import SamplingParams
from prefixrl_mcore.rollout.sampling import group_request, sample_groups
from tests.support.scripted_engine import GROUP_SIZE, ScriptedEngine, ScriptedVerifier

LENGTHS = {0: (9, 9), 1: (2, 3), 2: (5, 4)}


def scripted_evaluator(engine: ScriptedEngine) -> Evaluator:
    renderer: Any = SimpleNamespace(decode=str, completion_text=str)
    scripted: Any = engine
    verifier: Any = ScriptedVerifier(with_signal=frozenset({0, 2}))
    return Evaluator(
        engine=scripted,
        verifier=verifier,
        renderer=renderer,
        params=SamplingParams(
            temperature=1.0, max_completion_tokens=50, max_total_tokens=60, stop_token_ids=()
        ),
        seed=3,
    )


STARTS = [
    PrefixedProblem(
        prefixed_problem_id=f"p{index}",
        problem=Problem(problem_id=f"p{index}", text="x", answer=str(index)),
        prompt_token_ids=(index,),
    )
    for index in range(3)
]


def test_every_result_is_told_once_as_soon_as_it_may_be() -> None:
    told: list[StartResults] = []
    result = scripted_evaluator(ScriptedEngine(LENGTHS)).evaluate(
        STARTS, num_samples=GROUP_SIZE, label="x", on_results=told.append, keep_seconds=0.0
    )
    assert told == [  # in the order in which they finish
        {1: StartResult(num_correct=0, completion_tokens=5)},
        {2: StartResult(num_correct=1, completion_tokens=9)},
        {0: StartResult(num_correct=1, completion_tokens=18)},
    ]
    assert (result.num_correct, result.completion_tokens) == ((1, 0, 1), 32)


def test_results_are_told_together_where_nobody_wants_them_before() -> None:
    told: list[StartResults] = []
    scripted_evaluator(ScriptedEngine(LENGTHS)).evaluate(
        STARTS, num_samples=GROUP_SIZE, label="x", on_results=told.append
    )
    assert [list(results) for results in told] == [[0, 1, 2]]


def test_what_is_known_is_not_sampled_and_changes_no_seed() -> None:
    undisturbed, engine = ScriptedEngine(LENGTHS), ScriptedEngine(LENGTHS)
    expected = scripted_evaluator(undisturbed).evaluate(STARTS, num_samples=GROUP_SIZE, label="x")
    known = {1: StartResult(num_correct=0, completion_tokens=5)}
    result = scripted_evaluator(engine).evaluate(
        STARTS, num_samples=GROUP_SIZE, label="x", known=known
    )
    assert result == expected
    (requests,), (all_requests,) = engine.calls, undisturbed.calls
    assert requests == [all_requests[0], all_requests[2]]


def test_nothing_is_sampled_where_all_is_known() -> None:
    engine = ScriptedEngine(LENGTHS)
    known = dict.fromkeys(range(3), StartResult(num_correct=1, completion_tokens=6))
    result = scripted_evaluator(engine).evaluate(
        STARTS, num_samples=GROUP_SIZE, label="x", known=known
    )
    assert (result.num_correct, engine.calls) == ((1, 1, 1), [])


def test_an_engine_is_not_given_more_than_fits_into_memory() -> None:
    engine, told = ScriptedEngine(LENGTHS), list[list[str]]()
    evaluator = scripted_evaluator(engine)
    requests = [
        group_request(start, index, group_size=GROUP_SIZE, label="x", seed=3)
        for index, start in enumerate(STARTS)
    ]
    sample_groups(
        evaluator.engine,
        STARTS,
        requests,
        evaluator.params,
        on_groups=lambda groups: told.append(
            [f"{index}: {rollouts[0].rollout_id}" for index, rollouts in groups.items()]
        ),
        max_completions=2 * GROUP_SIZE + 1,
    )
    assert engine.calls == [requests[:2], requests[2:]]
    assert told == [["0: x/0/0", "1: x/1/0"], ["2: x/2/0"]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 138), (signal.SIGTERM, 143)])
def test_a_signal_ends_what_is_done_and_the_next_one_kills(
    number: signal.Signals, code: int
) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGUSR1, signal.SIGTERM)]
    after_first: list[object] = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            after_first.append(signal.getsignal(number))

    with pytest.raises(SystemExit) as end, exits_at_signals():
        work()
    assert (end.value.code, after_first) == (code, [signal.SIG_DFL])
    assert [signal.getsignal(one) for one in (signal.SIGUSR1, signal.SIGTERM)] == before
