"""What an interrupted call counts, and how it gets to the other ranks."""

import pickle

from prefixrl_mcore.records import Completion
from prefixrl_mcore.rollout.engine import SampleRequest
from prefixrl_mcore.rollout.interruption import SamplingInterrupted


def request_of(num_context_tokens: int, num_samples: int) -> SampleRequest:
    return SampleRequest(
        request_id="r",
        context_token_ids=(5,) * num_context_tokens,
        num_samples=num_samples,
        seed=0,
    )


def completion_of(num_tokens: int, num_cached_tokens: int) -> Completion:
    return Completion(
        token_ids=(7,) * num_tokens,
        logprobs=(-1.0,) * num_tokens,
        finish_reason="abort",
        policy_version=3,
        num_cached_tokens=num_cached_tokens,
    )


def test_completions_that_were_begun_count_with_their_contexts() -> None:
    requests = [request_of(10, 2), request_of(100, 2)]
    unstarted = Completion.unstarted(3)
    sampled = [[completion_of(4, 0), completion_of(6, 9)], [unstarted, completion_of(1, 50)]]

    interruption = SamplingInterrupted.after(requests, sampled)

    assert interruption.num_new_tokens == 4 + 6 + 1
    assert interruption.num_tokens == 11 + 10 + 10 + 100
    assert interruption.num_cached_tokens == 9 + 50
    assert "11 sampled tokens (131 with their contexts)" in str(interruption)


def test_it_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(SamplingInterrupted(3, 2, 1)))
    assert (error.num_tokens, error.num_new_tokens, error.num_cached_tokens) == (3, 2, 1)
    assert str(error) == str(SamplingInterrupted(3, 2, 1))
