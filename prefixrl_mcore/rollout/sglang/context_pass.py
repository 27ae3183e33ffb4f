"""A group's context, computed by a request of its own before the samples are asked for.

Samples that start at the same moment would each compute it: SGLang's cache knows a context when a
request with it has ended. SGLang has such a pass of its own for one request of n samples, but
throws its answer away: all samples then report the context as cached, and nobody as computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefixrl_mcore.records import Completion
from prefixrl_mcore.rollout.sglang.faults import BadAnswer, ServerLost


def context_pass_payload(context_token_ids: Sequence[int], request_id: str) -> dict[str, Any]:
    """Return the body of ``/generate`` that computes a context and samples nothing.

    Args:
        context_token_ids: [num_context_tokens].
        request_id: names the request to the server.
    """
    return {
        "input_ids": list(context_token_ids),
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "rid": request_id,
    }


def read_context_pass(answers: Sequence[Mapping[str, Any]], num_context_tokens: int) -> int:
    """Return the context tokens that the pass computed, the others being cached.

    Raises:
        ServerLost: if the server cut it off.
        BadAnswer: if it is no answer of SGLang's.
    """
    try:
        (answer,) = answers
        meta = answer["meta_info"]
        if meta["finish_reason"]["type"] == "abort":
            raise ServerLost(f"the pass over the context was cut off: {meta['finish_reason']}")
        return num_context_tokens - int(meta["cached_tokens"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswer(
            f"pass over the context: not an answer of SGLang's: {type(error).__name__} {error} in "
            f"{str(answers)[:200]!r}"
        ) from error


def with_context_pass(completions: Sequence[Completion], num_tokens: int) -> list[Completion]:
    """Return the completions of a group, the tokens of its pass counted among theirs.

    The pass is the first completion's, as if that had computed the context for all; what it has
    too few cached tokens for, a cache of whole pages having left out the last one, is the next's.
    A completion without tokens counts nowhere, and gets none of it.

    Args:
        completions: of one request.
        num_tokens: that its pass computed.
    """
    counted: list[Completion] = []
    for one in completions:
        num_here = min(num_tokens, one.num_cached_tokens) if one.token_ids else 0
        num_tokens -= num_here
        counted.append(replace(one, num_cached_tokens=one.num_cached_tokens - num_here))
    return counted
