"""Bodies of the calls that carry contexts or weights."""

import json
from collections.abc import Sequence
from typing import Any


def generate_payload(
    *,
    context_token_ids: Sequence[int],
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    stop_token_ids: Sequence[int],
    request_id: str,
    seeds: Sequence[int] | None = None,
    is_routed: bool = False,
) -> dict[str, Any]:
    """Return the body of ``/generate`` for one context.

    Every parameter that shapes the distribution is given: a model's generation config must not
    bring its own top-p or top-k. Several samples are as many requests with the same context, sent
    at once, unless ``is_routed``.

    Args:
        context_token_ids: [num_context_tokens].
        num_samples: completions.
        max_new_tokens: of each completion.
        temperature: 0 is greedy.
        stop_token_ids: tokens that end a completion.
        request_id: names the request to the server; a beginning of it aborts it.
        seeds: [num_samples] for a deterministic server.
        is_routed: one request of n samples, which the server makes a pass over the context for: a
            router would not send a pass of ours and the samples to the same server. With seeds
            they are requests of their own all the same, since those of one share its seed.
    """
    parameters: dict[str, Any] = {
        "n": 1,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(stop_token_ids),
        # True switches all stop tokens off, ours too.
        "ignore_eos": not stop_token_ids,
        "skip_special_tokens": False,
    }
    input_ids: list[Any] = list(context_token_ids)
    sampling_params: Any = parameters
    if seeds is not None:
        sampling_params = [parameters | {"sampling_seed": seed} for seed in seeds]
    elif is_routed:
        parameters["n"] = num_samples
    if seeds is not None or parameters["n"] < num_samples:  # a list of parameters, or of samples
        input_ids = [input_ids] * num_samples
    return {
        "input_ids": input_ids,
        "sampling_params": sampling_params,
        "return_logprob": True,
        "logprob_start_len": -1,
        "rid": request_id,
    }


def tensor_update(serialized: Sequence[str]) -> bytes:
    """Return the body of ``/update_weights_from_tensor``; one entry per tensor-parallel rank."""
    payload = {
        "serialized_named_tensors": list(serialized),
        "load_format": "flattened_bucket",
        "flush_cache": False,
    }
    return json.dumps(payload).encode()
