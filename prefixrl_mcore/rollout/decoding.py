"""Decoding of one batch of rows with a ``transformers`` model, a token of every row per step.

Shapes: B rows, T new tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixrl_mcore.records import Completion, FinishReason
from prefixrl_mcore.rollout.engine import SampleRequest, SamplingParams
from prefixrl_mcore.rollout.kv_cache import SlotCache, compute_contexts
from prefixrl_mcore.rollout.token_draws import TokenDraws, draw_tokens

_PREFILL_TOKENS = 8192
"""Context tokens, padding included, that are computed in one forward pass."""

_COMPACT_BELOW = 0.75
"""Finished rows are dropped from the batch once fewer than this share of it is left: dropping
copies the KV cache, which a row or two are not worth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One completion that is to be sampled."""

    request: SampleRequest
    """The request that the completion belongs to."""

    sample_index: int
    """Index of the completion in its request."""

    max_new_tokens: int
    """Length at which the completion is cut off."""


class _Tokens:
    """What has been sampled so far: [B, T] tokens and logprobs, growing."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._tokens_BT = torch.zeros((num_rows, 64), dtype=torch.int64, device=device)
        self._logprobs_BT = torch.zeros((num_rows, 64), dtype=torch.float32, device=device)

    def write(self, rows: Tensor, step: int, tokens: Tensor, logprobs: Tensor) -> None:
        if step == self._tokens_BT.shape[1]:
            self._tokens_BT = torch.cat([self._tokens_BT, torch.zeros_like(self._tokens_BT)], 1)
            self._logprobs_BT = torch.cat(
                [self._logprobs_BT, torch.zeros_like(self._logprobs_BT)], 1
            )
        self._tokens_BT[rows, step] = tokens
        self._logprobs_BT[rows, step] = logprobs

    def row(self, row: int, length: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        tokens = self._tokens_BT[row, :length].tolist()
        return tuple(tokens), tuple(self._logprobs_BT[row, :length].tolist())


class BatchDecoder:
    """Samples all rows of one batch; the context of a request is computed once."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        params: SamplingParams,
        *,
        policy_version: int,
    ) -> None:
        """Take ``rows``; rows of one request must be neighbours."""
        self._model = model
        self._rows = rows
        self._params = params
        self._policy_version = policy_version
        self._device: torch.device = model.device
        self._lengths_B = self._column([len(row.request.context_token_ids) for row in rows])
        self._limits_B = self._column([row.max_new_tokens for row in rows])
        self._draws = TokenDraws(
            [(row.request, row.sample_index) for row in rows], device=self._device
        )
        self._is_stop_V = torch.zeros(
            model.config.vocab_size, dtype=torch.bool, device=self._device
        )
        self._is_stop_V[list(params.stop_token_ids)] = True

    @torch.inference_mode()
    def run(self, on_done: Callable[[int, Completion], None], is_over: Callable[[], bool]) -> None:
        """Sample every row; ``on_done`` is called with (row, completion) when one has ended.

        ``is_over`` is asked after each token; once it is True the rows that still sample are
        aborted, and ``on_done`` is told of them too.
        """
        cache, logits_BV = self._compute_contexts()
        sampled = _Tokens(len(self._rows), self._device)
        # Original indices of the rows in the batch, and which of them still sample.
        rows = torch.arange(len(self._rows), device=self._device)
        is_live = torch.ones_like(rows, dtype=torch.bool)
        step = 0
        while True:
            tokens, logprobs = self._choose(logits_BV, rows, step)
            sampled.write(rows, step, tokens, logprobs)
            is_stop = self._is_stop_V[tokens]
            has_ended = is_live & (is_stop | (self._limits_B[rows] == step + 1))
            if bool(has_ended.any()):
                for index in has_ended.nonzero()[:, 0].tolist():
                    reason: FinishReason = "stop" if bool(is_stop[index]) else "length"
                    row = int(rows[index])
                    done = self._completion(row, sampled.row(row, step + 1), reason)
                    on_done(row, done)
                is_live &= ~has_ended
                num_live = int(is_live.sum())
                if num_live == 0:
                    return
                if num_live < _COMPACT_BELOW * len(rows):
                    kept = is_live.nonzero()[:, 0]
                    cache.keep_rows(kept)
                    rows, tokens, is_live = rows[kept], tokens[kept], is_live[kept]
            if is_over():
                for row in rows[is_live].tolist():
                    on_done(row, self._completion(row, sampled.row(row, step + 1), "abort"))
                return
            logits_BV = self._next_logits(cache, tokens, self._lengths_B[rows] + step)
            step += 1

    def _compute_contexts(self) -> tuple[SlotCache, Tensor]:
        """Return the filled cache and the [B, V] logits after each row's context."""
        cache = SlotCache(
            num_layers=self._model.config.num_hidden_layers,
            context_lengths_B=self._lengths_B,
            max_new_tokens=int(self._limits_B.max()),
        )
        logits: list[Tensor] = []
        for rows, contexts, context_of_row in self._prefill_parts():
            computed, logits_PV = compute_contexts(self._model, contexts, self._device)
            context_B = self._column(context_of_row)
            cache.fill(rows, computed, context_B)
            logits.append(logits_PV[context_B])
        return cache, torch.cat(logits)

    def _prefill_parts(self) -> Iterator[tuple[slice, list[tuple[int, ...]], list[int]]]:
        """Yield (rows, contexts, context of each row), each part within the token budget."""
        first, longest = 0, 0
        contexts: list[tuple[int, ...]] = []
        context_of_row: list[int] = []
        previous = ""
        for index, row in enumerate(self._rows):
            if row.request.request_id != previous:
                previous = row.request.request_id
                context = row.request.context_token_ids
                longest = max(longest, len(context))
                if contexts and longest * (len(contexts) + 1) > _PREFILL_TOKENS:
                    yield slice(first, index), contexts, context_of_row
                    first, longest, contexts, context_of_row = index, len(context), [], []
                contexts.append(context)
            context_of_row.append(len(contexts) - 1)
        yield slice(first, len(self._rows)), contexts, context_of_row

    def _choose(self, logits_BV: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return [B] tokens and their float32 logprobs at the sampling temperature."""
        temperature = self._params.temperature
        logprobs_BV = torch.log_softmax(logits_BV.float() / (temperature or 1.0), dim=-1)
        if temperature == 0:
            tokens = logprobs_BV.argmax(dim=-1)
        else:
            tokens = draw_tokens(logprobs_BV, self._draws.uniforms_of_step(step)[rows])
        return tokens, logprobs_BV.gather(1, tokens[:, None])[:, 0]

    def _next_logits(self, cache: SlotCache, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the [B, V] logits after one more token of every row."""
        output = self._model(
            input_ids=tokens[:, None],
            attention_mask=cache.mask_of_next_step(),
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[:, 0]

    def _completion(
        self,
        row: int,
        sampled: tuple[tuple[int, ...], tuple[float, ...]],
        finish_reason: FinishReason,
    ) -> Completion:
        is_first = row == 0 or self._rows[row - 1].request is not self._rows[row].request
        num_context_tokens = len(self._rows[row].request.context_token_ids)
        return Completion(
            token_ids=sampled[0],
            logprobs=sampled[1],
            finish_reason=finish_reason,
            policy_version=self._policy_version,
            num_cached_tokens=0 if is_first else num_context_tokens,
        )

    def _column(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
