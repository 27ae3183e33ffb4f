"""What an engine is asked for: checked, and how long each completion may get."""

import math
from collections.abc import Sequence

from prefixrl_mcore.rollout.engine import SampleRequest, SamplingParams


def completion_limits(
    requests: Sequence[SampleRequest],
    params: SamplingParams,
    *,
    vocab_size: int,
    max_positions: int | None,
) -> list[int]:
    """Return the most new tokens that each request may have.

    Args:
        requests: what is asked for.
        params: how to sample.
        vocab_size: token ids must be below it.
        max_positions: positions that the model was made for; None if it names no limit.

    Raises:
        ValueError: if a context is empty, holds an unknown token id or leaves no room for a
            completion; if ids repeat; if a count or the temperature makes no sense; if a completion
            could run past the model's last position.
    """
    _check_params(params, vocab_size)
    seen: set[str] = set()
    limits: list[int] = []
    for request in requests:
        name = f"request {request.request_id!r}"
        if request.request_id in seen:
            raise ValueError(f"{name}: two requests have this id; ids must be unique in a call")
        seen.add(request.request_id)
        if request.num_samples < 1:
            raise ValueError(f"{name}: expected num_samples >= 1, got {request.num_samples}")
        if request.max_completion_tokens is not None and request.max_completion_tokens < 1:
            raise ValueError(
                f"{name}: expected max_completion_tokens >= 1, got {request.max_completion_tokens}"
            )
        _check_context(name, request.context_token_ids, vocab_size)
        room = params.max_total_tokens - len(request.context_token_ids)
        if room < 1:
            raise ValueError(
                f"{name}: its context of {len(request.context_token_ids)} tokens leaves no "
                f"room for a completion in max_total_tokens={params.max_total_tokens}; raise "
                "rollout.max_total_tokens or drop the problem or its prefix"
            )
        limit = min(params.max_completion_tokens, room)
        if request.max_completion_tokens is not None:
            limit = min(limit, request.max_completion_tokens)
        total = len(request.context_token_ids) + limit
        if max_positions is not None and total > max_positions:
            raise ValueError(
                f"{name}: context and completion may take {total} tokens, the model has "
                f"{max_positions} positions; lower rollout.max_total_tokens to {max_positions}"
            )
        limits.append(limit)
    return limits


def _check_params(params: SamplingParams, vocab_size: int) -> None:
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise ValueError(
            f"sampling: expected a temperature >= 0 (0 is greedy), got {params.temperature}"
        )
    if params.max_completion_tokens < 1:
        raise ValueError(
            f"sampling: expected max_completion_tokens >= 1, got {params.max_completion_tokens}"
        )
    unknown = [token for token in params.stop_token_ids if not 0 <= token < vocab_size]
    if unknown:
        raise ValueError(
            f"sampling: stop token ids {unknown} are outside the vocabulary of {vocab_size} tokens"
        )


def _check_context(name: str, context_token_ids: tuple[int, ...], vocab_size: int) -> None:
    if not context_token_ids:
        raise ValueError(f"{name}: expected a context of at least one token, got an empty one")
    low, high = min(context_token_ids), max(context_token_ids)
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name}: its context holds token id {low if low < 0 else high}, expected ids in "
            f"0..{vocab_size - 1}; the prompt and the model do not share a tokenizer"
        )
