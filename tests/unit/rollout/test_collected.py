"""Completions by request: who is asked whether they are enough, and how often."""

from prefixrl_mcore.records import Completion, FinishReason
from prefixrl_mcore.rollout.collected import Collected
from prefixrl_mcore.rollout.decoding import Row
from prefixrl_mcore.rollout.engine import SampleRequest

REQUESTS = [
    SampleRequest(request_id=name, context_token_ids=(1,), num_samples=2, seed=0) for name in "abc"
]


def completion_of(length: int, finish_reason: FinishReason = "stop") -> Completion:
    return Completion(
        token_ids=(7,) * length,
        logprobs=(-1.0,) * length,
        finish_reason=finish_reason,
        policy_version=4,
    )


def test_requests_that_finish_after_it_was_enough_are_announced_and_not_asked_about() -> None:
    asked: list[int] = []
    announced: list[tuple[int, int]] = []

    def is_enough(index: int, completions: list[Completion]) -> bool:
        asked.append(index)
        return len(asked) == 1

    collected = Collected(
        REQUESTS,
        is_enough,
        lambda *counts: announced.append(counts),
        lambda: len(announced) == 2,  # too late: nothing is to be sampled any more
    )

    def add(request: int, sample: int, completion: Completion) -> bool:
        row = Row(request=REQUESTS[request], sample_index=sample, max_new_tokens=9)
        collected.add(row, completion)
        return collected.is_over()

    assert not add(1, 1, completion_of(2))
    assert add(1, 0, completion_of(3))  # the whole request
    assert add(0, 0, completion_of(4))
    assert add(0, 1, completion_of(4))  # finished in the same step of the decoder
    assert add(2, 1, completion_of(1, "abort"))

    assert asked == [1]
    assert announced == [(2, 5), (2, 8)]
    assert not collected.was_interrupted
    groups = collected.in_order(policy_version=4)
    assert [[len(one.token_ids) for one in group] for group in groups] == [[4, 4], [3, 2], [0, 1]]
    assert [one.finish_reason for one in groups[2]] == ["abort", "abort"]


def test_an_interruption_ends_it_for_good_whatever_is_finished() -> None:
    answers = iter([False, True])  # asked no third time
    collected = Collected(REQUESTS, lambda *_: False, None, lambda: next(answers))

    assert [collected.is_over() for _ in range(4)] == [False, True, True, True]
    assert collected.was_interrupted
