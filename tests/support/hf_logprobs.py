"""The truth about a completion's logprobs: one plain forward pass of ``transformers``."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def hf_completion_logprobs(
    model: PreTrainedModel,
    context_token_ids: Sequence[int],
    completion_token_ids: Sequence[int],
    *,
    temperature: float,
) -> list[float]:
    """Return the float32 logprob (nats) of every completion token at ``temperature``."""
    ids = torch.tensor([[*context_token_ids, *completion_token_ids]])
    logits_SV = model(input_ids=ids).logits[0].float() / temperature
    logprobs_SV = torch.log_softmax(logits_SV, dim=-1)
    first = len(context_token_ids) - 1
    return [float(logprobs_SV[first + i, t]) for i, t in enumerate(completion_token_ids)]


@torch.no_grad()
def hf_greedy_completion(
    model: PreTrainedModel, context_token_ids: Sequence[int], num_tokens: int
) -> tuple[int, ...]:
    """Return the most likely continuation, one full forward pass per token."""
    ids = list(context_token_ids)
    for _ in range(num_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(context_token_ids) :])
