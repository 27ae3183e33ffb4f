"""A completion that was carried over knows which weights sampled which tokens."""

import pytest

from prefixrl_mcore.records import Completion, FinishReason, VersionSpan


def completion_of(
    token_ids: tuple[int, ...], version: int, finish_reason: FinishReason = "abort", cached: int = 0
) -> Completion:
    return Completion(
        token_ids=token_ids,
        logprobs=tuple(-float(token) for token in token_ids),
        finish_reason=finish_reason,
        policy_version=version,
        num_cached_tokens=cached,
    )


def spans_of(completion: Completion) -> list[tuple[int, int]]:
    return [(span.policy_version, span.num_tokens) for span in completion.version_spans]


def test_a_continued_completion_has_the_spans_of_its_parts() -> None:
    first = completion_of((1, 2), 3, cached=7)
    whole = first.continued_by(completion_of((3,), 4)).continued_by(
        completion_of((4, 5, 6), 6, "stop", cached=9)
    )
    assert whole.token_ids == (1, 2, 3, 4, 5, 6)
    assert whole.logprobs == (-1.0, -2.0, -3.0, -4.0, -5.0, -6.0)
    assert (whole.finish_reason, whole.policy_version, whole.num_cached_tokens) == ("stop", 6, 16)
    assert spans_of(whole) == [(3, 2), (4, 1), (6, 3)]
    assert whole.earlier_spans == (
        VersionSpan(policy_version=3, num_tokens=2),
        VersionSpan(policy_version=4, num_tokens=1),
    )


def test_parts_of_the_same_weights_are_one_span() -> None:
    whole = completion_of((1, 2), 3).continued_by(completion_of((3,), 3, "stop"))
    assert spans_of(whole) == [(3, 3)]
    assert whole.earlier_spans == ()


def test_nothing_sampled_leaves_everything_as_it_was() -> None:
    first, nothing = completion_of((1,), 3, cached=5), completion_of((), 4)
    assert first.continued_by(nothing) == first
    assert nothing.continued_by(first) == first
    assert nothing.version_spans == ()
    assert not first.is_finished
    assert completion_of((1,), 3, "length").is_finished


def test_spans_longer_than_the_completion_are_refused() -> None:
    with pytest.raises(ValueError, match="1 tokens but earlier spans"):
        Completion(
            token_ids=(1,),
            logprobs=(-1.0,),
            finish_reason="stop",
            policy_version=1,
            earlier_spans=(VersionSpan(policy_version=0, num_tokens=2),),
        )
