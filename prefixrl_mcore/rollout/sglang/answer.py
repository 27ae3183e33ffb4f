"""Reading one completion out of SGLang's answer, believing nothing that can be checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefixrl_mcore.records import Completion, FinishReason
from prefixrl_mcore.rollout.engine import RolloutError
from prefixrl_mcore.rollout.sglang.faults import BadAnswer, ServerLost, WrongWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerReader:
    """What the answers to one request must satisfy."""

    where: str
    """Engine and request, named in every error."""

    max_new_tokens: int
    """The request's length limit."""

    stop_token_ids: frozenset[int]
    """Tokens that may end a completion."""

    vocab_size: int
    """Token ids are below it."""

    weight_version: str
    """Name of the weights that must have sampled the completion."""

    policy_version: int
    """Version of those weights, for the record."""

    may_be_aborted: bool = False
    """We asked for an end: what was sampled until then counts."""

    def read(self, answer: Mapping[str, Any]) -> Completion:
        """Return the completion of one answer.

        Raises:
            ServerLost: if the server cut the completion off unasked: it may be retried.
            WrongWeights: if other weights sampled it.
            BadAnswer: if the answer is not a completion of the request.
            RolloutError: if the server has too little room for the request.
        """
        try:
            return self._read(answer)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise BadAnswer(
                f"{self.where}: not an answer of SGLang's: {type(error).__name__} {error} in "
                f"{str(answer)[:200]!r}"
            ) from error

    def _read(self, answer: Mapping[str, Any]) -> Completion:
        meta = answer["meta_info"]
        self._check_weights(meta)
        is_aborted = meta["finish_reason"]["type"] == "abort"
        # A request that is aborted before it ran has neither logprobs nor cached tokens.
        pairs = (
            (meta.get("output_token_logprobs") or [])
            if is_aborted
            else (meta["output_token_logprobs"])
        )
        token_ids = tuple(int(pair[1]) for pair in pairs)
        logprobs = tuple(float(pair[0]) for pair in pairs)
        finish_reason = self._finish_reason(meta["finish_reason"], token_ids)
        output_ids = answer.get("output_ids")
        if output_ids is not None and tuple(output_ids) != token_ids:
            raise BadAnswer(
                f"{self.where}: {len(output_ids)} tokens do not match the {len(token_ids)} tokens "
                "that logprobs came for"
            )
        unknown = [token for token in token_ids if not 0 <= token < self.vocab_size]
        if unknown:
            raise BadAnswer(
                f"{self.where}: token id {unknown[0]} came, expected ids in "
                f"0..{self.vocab_size - 1}"
            )
        bad = [index for index, value in enumerate(logprobs) if not math.isfinite(value)]
        if bad:
            raise BadAnswer(
                f"{self.where}: logprob {logprobs[bad[0]]} of completion token {bad[0]} is not "
                "finite; the weights or the engine's precision are broken"
            )
        return Completion(
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            policy_version=self.policy_version,
            num_cached_tokens=int(
                meta.get("cached_tokens", 0) if is_aborted else meta["cached_tokens"]
            ),
        )

    def _check_weights(self, meta: Mapping[str, Any]) -> None:
        # Newer servers also name every span of a completion that saw an update.
        spans = meta.get("weight_versions") or []
        if str(meta["weight_version"]) != self.weight_version or len(spans) > 1:
            raise WrongWeights(
                f"{self.where}: sampled with weights {spans or meta['weight_version']!r}, "
                f"expected {self.weight_version!r} (policy version {self.policy_version}); does "
                "another trainer update this server?"
            )

    def _finish_reason(
        self, answered: Mapping[str, Any], token_ids: tuple[int, ...]
    ) -> FinishReason:
        """Return why the completion ended, once its length and last token agree with that."""
        kind = answered["type"]
        if len(token_ids) > self.max_new_tokens:
            raise BadAnswer(
                f"{self.where}: {len(token_ids)} tokens came, at most {self.max_new_tokens} were "
                "asked for"
            )
        if kind == "abort" and self.may_be_aborted:
            return "abort"
        if kind == "abort":
            raise ServerLost(f"{self.where}: cut off by the server: {answered}")
        if kind == "stop":
            if token_ids and token_ids[-1] in self.stop_token_ids:
                return "stop"
            raise BadAnswer(
                f"{self.where}: stopped with {answered} after tokens {list(token_ids[-3:])}, "
                f"expected a last token out of {sorted(self.stop_token_ids)}"
            )
        if kind != "length":
            raise BadAnswer(f"{self.where}: unknown finish reason {answered}")
        if len(token_ids) < self.max_new_tokens:
            raise RolloutError(
                f"{self.where}: cut off after {len(token_ids)} of {self.max_new_tokens} tokens: "
                "the server's KV cache or context length is too small; raise "
                "rollout.sglang.max_kv_tokens or memory_fraction"
            )
        # SGLang looks at the length first, so an end token in the last place goes unreported.
        return "stop" if token_ids[-1] in self.stop_token_ids else "length"
