"""Requests for pools of real servers: contexts that differ, of one length."""

from prefixrl_mcore.rollout.engine import SampleRequest, SamplingParams

CONTEXT_TOKENS = 50


def requests_of(count: int, num_samples: int = 4) -> list[SampleRequest]:
    return [
        SampleRequest(
            request_id=f"r{index}",
            context_token_ids=tuple(4 + (index + 3 * i) % 28 for i in range(CONTEXT_TOKENS)),
            num_samples=num_samples,
            seed=index,
        )
        for index in range(count)
    ]


def params_of(max_completion_tokens: int, *, max_total_tokens: int = 1200) -> SamplingParams:
    return SamplingParams(
        temperature=1.0,
        max_completion_tokens=max_completion_tokens,
        max_total_tokens=max_total_tokens,
        stop_token_ids=(),
    )
