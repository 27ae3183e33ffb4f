"""Random numbers that belong to a row, whatever else is in the batch.

Shapes: B rows, V vocabulary.
"""

import torch
from torch import Tensor

from prefixrl_mcore.rollout.engine import SampleRequest

_BLOCK_STEPS = 64
"""Steps drawn at once per request; a constant, since the numbers depend on it."""


class TokenDraws:
    """One uniform number per row and step, from the row's request seed and sample index."""

    def __init__(self, rows: list[tuple[SampleRequest, int]], device: torch.device) -> None:
        """Prepare the draws of ``rows``: (request, index of the sample in the request)."""
        self._device = device
        self._generators: dict[str, torch.Generator] = {}
        self._requests: dict[str, SampleRequest] = {}
        for request, _ in rows:
            if request.request_id not in self._generators:
                generator = torch.Generator().manual_seed(request.seed)
                self._generators[request.request_id] = generator
                self._requests[request.request_id] = request
        self._rows = rows
        self._block = -1
        self._uniforms_BK = torch.empty(0)

    def uniforms_of_step(self, step: int) -> Tensor:
        """Return [num_rows] float64 in [0, 1) for all rows; steps must not go backwards."""
        block, column = divmod(step, _BLOCK_STEPS)
        while self._block < block:
            self._uniforms_BK = self._draw_block()
            self._block += 1
        return self._uniforms_BK[:, column]

    def _draw_block(self) -> Tensor:
        """Draw the next steps of every request, all its samples: a row finds its own there."""
        drawn = {
            request_id: torch.rand(
                (self._requests[request_id].num_samples, _BLOCK_STEPS),
                generator=generator,
                dtype=torch.float64,
            )
            for request_id, generator in self._generators.items()
        }
        rows = [drawn[request.request_id][sample_index] for request, sample_index in self._rows]
        return torch.stack(rows).to(self._device)


def draw_tokens(logprobs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Return [B] int64 tokens drawn from ``logprobs_BV`` by inverting its distribution function.

    The sum runs in float64: in float32 the tail of a large vocabulary would be lost. A token of
    probability zero is never drawn.

    Args:
        logprobs_BV: [B, V] float32 logprobs (nats), normalised.
        uniforms_B: [B] float64 in [0, 1).
    """
    cumulative_BV = logprobs_BV.double().exp_().cumsum(dim=-1)
    thresholds_B = uniforms_B * cumulative_BV[:, -1]
    tokens_B = torch.searchsorted(cumulative_BV, thresholds_B[:, None], right=True)[:, 0]
    # Rounding can lift the threshold to the total, one past the last token.
    return tokens_B.clamp_(max=logprobs_BV.shape[1] - 1)
