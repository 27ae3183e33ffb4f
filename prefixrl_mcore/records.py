"""Frozen records that cross module boundaries.

No torch, no config. A stage that learns a new fact makes a new record (``Rollout`` becomes
``ScoredRollout``) instead of filling an optional field later. Token sequences are tuples of
Python ints; logprobs are natural logarithms (nats).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]
"""``stop``: an end token was sampled; ``length``: the token budget ran out; ``abort``: cut off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionSpan:
    """Neighbouring tokens of a completion that the same weights sampled."""

    policy_version: int
    """Version of these weights."""

    num_tokens: int
    """How many tokens; at least one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One dataset item: a text, its reference answer and an id that is unique in the data set."""

    problem_id: str
    """Unique within the problem file; carried through every later record."""

    text: str
    """The problem as a human would read it, before any prompt template is applied."""

    answer: str
    """Reference answer in the form that the verifier expects (LaTeX or plain text)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A problem rendered through the prompt template up to where the answer starts."""

    problem: Problem
    """The problem that was rendered."""

    token_ids: tuple[int, ...]
    """[num_prompt_tokens] never empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """A recorded, verified attempt at a problem; the stock that prefixes are cut from."""

    trace_id: str
    """Unique within the trace store."""

    problem_id: str
    """The problem that this trace answers."""

    prompt_token_ids: tuple[int, ...]
    """[num_prompt_tokens] the prompt that the trace continues."""

    completion_token_ids: tuple[int, ...]
    """[num_completion_tokens] the attempt, end token included when one was sampled."""

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens."""
        return len(self.prompt_token_ids) + len(self.completion_token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixedProblem:
    """What a group of rollouts starts from: a prompt and, possibly, a prefix of a trace."""

    prefixed_problem_id: str
    """``<problem_id>`` without a prefix, ``<problem_id>#<trace_id>@<cut>`` with one."""

    problem: Problem
    """The problem to be solved; its answer decides the reward."""

    prompt_token_ids: tuple[int, ...]
    """[num_prompt_tokens] the rendered problem."""

    prefix_token_ids: tuple[int, ...] = ()
    """[num_prefix_tokens] conditioned on, never trained on; empty when there is no prefix."""

    trace_id: str = ""
    """The trace that the prefix was cut from; empty without a prefix."""

    fraction: float = 0.0
    """``num_prefix_tokens / num_trace_tokens``; 0 without a prefix."""

    answer_in_prefix: bool = False
    """The prefix already states the reference answer, so a correct rollout may prove nothing."""

    @property
    def context_token_ids(self) -> tuple[int, ...]:
        """[num_prompt_tokens + num_prefix_tokens] what the engine is conditioned on."""
        return self.prompt_token_ids + self.prefix_token_ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What an engine samples after a context; the engine knows nothing of problems."""

    token_ids: tuple[int, ...]
    """[num_completion_tokens] sampled tokens, the end token included; at least one, unless it was
    aborted."""

    logprobs: tuple[float, ...]
    """[num_completion_tokens] nats, at the sampling temperature, as reported by the engine."""

    finish_reason: FinishReason
    """Why sampling ended."""

    policy_version: int
    """Version of the weights that sampled this completion, or the last tokens of one that was
    carried over."""

    earlier_spans: tuple[VersionSpan, ...] = ()
    """What older weights sampled of a completion that was carried over, in order; empty for one
    that was sampled at one go."""

    num_cached_tokens: int = 0
    """Context tokens that the engine took from its KV cache instead of computing them, over all
    requests of a completion that was carried over: the context of a later one has its tokens so
    far."""

    @classmethod
    def unstarted(cls, policy_version: int) -> "Completion":
        """Return a completion that was aborted before its first token."""
        return cls(token_ids=(), logprobs=(), finish_reason="abort", policy_version=policy_version)

    def __post_init__(self) -> None:
        """Refuse logprobs that do not line up with the tokens."""
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                f"completion: {len(self.token_ids)} token ids but {len(self.logprobs)} logprobs"
            )
        if sum(span.num_tokens for span in self.earlier_spans) > len(self.token_ids):
            raise ValueError(
                f"completion: {len(self.token_ids)} tokens but earlier spans {self.earlier_spans}"
            )

    @property
    def version_spans(self) -> tuple[VersionSpan, ...]:
        """Versions of all tokens, in order; empty without tokens."""
        num_last = len(self.token_ids) - sum(span.num_tokens for span in self.earlier_spans)
        if not num_last:
            return self.earlier_spans
        return (
            *self.earlier_spans,
            VersionSpan(policy_version=self.policy_version, num_tokens=num_last),
        )

    @property
    def is_finished(self) -> bool:
        """It ended by itself or at its token budget, and was not cut off."""
        return self.finish_reason != "abort"

    def continued_by(self, later: "Completion") -> "Completion":
        """Return this completion with the tokens that were sampled after it."""
        if not later.token_ids:
            return self
        spans = [*self.version_spans, *later.version_spans]
        merged: list[VersionSpan] = []
        for span in spans:
            if merged and merged[-1].policy_version == span.policy_version:
                num_tokens = merged.pop().num_tokens + span.num_tokens
                span = replace(span, num_tokens=num_tokens)
            merged.append(span)
        return Completion(
            token_ids=self.token_ids + later.token_ids,
            logprobs=self.logprobs + later.logprobs,
            finish_reason=later.finish_reason,
            policy_version=later.policy_version,
            earlier_spans=tuple(merged[:-1]),
            # A request without tokens counts nothing, neither its context nor what was cached.
            num_cached_tokens=later.num_cached_tokens
            + (self.num_cached_tokens if self.token_ids else 0),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One completion sampled by the policy after a prompt and, possibly, a prefix."""

    rollout_id: str
    """``<step>/<group index>/<index in group>``, unique in the run."""

    prefixed_problem: PrefixedProblem
    """What the rollout started from; equal for all rollouts of a group."""

    completion: Completion
    """Tokens, logprobs and end of what was sampled; the only trained tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartedGroup:
    """A group that is being sampled: what each of its rollouts has so far."""

    group_id: str
    """``<label>/<index>`` of the call that first took its problem, kept when it is carried over,
    also without its tokens; names its rollouts, and is unique in the run."""

    prefixed_problem: PrefixedProblem
    """What every rollout of the group starts from."""

    completions: tuple[Completion, ...] = ()
    """[group_size] so far, with finish reason ``abort`` where more is to come; empty before the
    first call."""

    @property
    def is_finished(self) -> bool:
        """No rollout of the group is to be continued."""
        return bool(self.completions) and all(one.is_finished for one in self.completions)

    @property
    def num_tokens(self) -> int:
        """Tokens sampled so far."""
        return sum(len(one.token_ids) for one in self.completions)

    @property
    def oldest_version(self) -> int | None:
        """Oldest weights that sampled any of the tokens so far; None without tokens."""
        versions = [span.policy_version for c in self.completions for span in c.version_spans]
        return min(versions, default=None)

    def rollouts(self) -> list["Rollout"]:
        """Return the finished group's rollouts."""
        assert self.is_finished, f"group {self.group_id} is still being sampled"
        return [
            Rollout(
                rollout_id=f"{self.group_id}/{index}",
                prefixed_problem=self.prefixed_problem,
                completion=completion,
            )
            for index, completion in enumerate(self.completions)
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A verifier's decision on one completion."""

    reward: float
    """1.0 for a correct answer, 0.0 otherwise."""

    reason: str
    """Short code: ``correct``, ``wrong``, ``no_answer``, ``timeout``, ``memory``, ``crash``, …"""

    extracted: str = ""
    """The answer found in the text, as text; empty when none was found."""

    seconds: float = 0.0
    """Wall time that the verification took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRollout:
    """A rollout and the verifier's verdict on it."""

    rollout: Rollout
    """The rollout that was judged."""

    verdict: Verdict
    """What the verifier said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Scored rollouts of one prompt *and* prefix, with the advantages of each."""

    prefixed_problem: PrefixedProblem
    """What every rollout of the group started from."""

    rollouts: tuple[ScoredRollout, ...]
    """[group_size] the group's rollouts."""

    advantages: tuple[float, ...]
    """[group_size] reward minus the group's baseline, possibly normalised."""

    @property
    def rewards(self) -> tuple[float, ...]:
        """[group_size] the verifier's rewards."""
        return tuple(scored.verdict.reward for scored in self.rollouts)

    @property
    def is_all_negative(self) -> bool:
        """No rollout of the group was rewarded, so the group carries no policy gradient."""
        return not any(self.rewards)

    @property
    def has_signal(self) -> bool:
        """Some advantage is not zero, so that the group carries a policy gradient."""
        return any(self.advantages)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSequence:
    """One packed item: context that is conditioned on, completion that is trained on."""

    sequence_id: str
    """The rollout id, or the trace id for SFT."""

    group_index: int
    """Sequences with equal ``group_index`` share their context and are packed together."""

    context_token_ids: tuple[int, ...]
    """[num_context_tokens] prompt and prefix: conditioned on, never trained on; not empty."""

    completion_token_ids: tuple[int, ...]
    """[num_completion_tokens] trained on; not empty."""

    advantage: float
    """Coefficient of the sequence's log-likelihood; 1.0 for SFT."""

    rollout_logprobs: tuple[float, ...] = ()
    """[num_completion_tokens] nats from the engine; empty for SFT."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """What one optimizer step did, summed over all ranks and microbatches."""

    loss: float
    """Sum over trained tokens divided by their global number; what a router loss of a mixture adds
    to the minimised objective is not in it."""

    gradient_norm: float
    """Global L2 norm before clipping; 0.0 when the step was skipped."""

    learning_rate: float
    """Learning rate that was applied."""

    num_trained_tokens: int
    """Completion tokens in the global batch."""

    num_computed_tokens: int = 0
    """Tokens of the streams that the model ran over all ranks: context, completion and the padding
    that could not be cut off."""

    model_flops: float = 0.0
    """FLOPs of the model's matrix products over all ranks, nothing recomputed; a skipped step runs
    the forward pass only (``accounting.model_flops``)."""

    forward_backward_seconds: float = field(default=0.0, compare=False)
    """Wall time of the passes over all microbatches, the gradients' reduction included."""

    compute_seconds: float = field(default=0.0, compare=False)
    """The part of it before this rank waits for the gradients of the others."""

    optimizer_seconds: float = field(default=0.0, compare=False)
    """Wall time of gradient norm, clipping, optimizer step and schedule."""

    was_skipped: bool = False
    """True when no token carried a gradient, so that the optimizer was not called."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further ``area/quantity_unit`` values, already reduced over ranks."""
