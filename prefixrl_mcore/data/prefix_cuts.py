"""Cutting prefixes from traces: once, at random token positions, as token ids.

A prefix is a slice of the trace's token ids. It is never decoded and tokenised again, so the
policy is conditioned on exactly the tokens that were sampled.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from prefixrl_mcore.config.data import PrefixConfig
from prefixrl_mcore.data.prompts import PromptRenderer
from prefixrl_mcore.records import PrefixedProblem, Problem, Trace
from prefixrl_mcore.rewards.base import Verifier

_logger = logging.getLogger(__name__)

FindsAnswer = Callable[[Sequence[tuple[str, tuple[int, ...]]]], list[bool]]
"""For each (reference answer, prefix token ids): does the prefix already state the answer?"""

_NUM_SHOWN = 5
"""Items listed in an error before it only counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixStats:
    """What became of every trace and cut."""

    num_traces: int
    """Traces given."""

    num_traces_without_problem: int
    """Traces whose problem is not among the problems given; nothing was cut from them."""

    num_traces_without_cut: int
    """Traces too short for any token position between the two fractions."""

    num_missing_cuts: int
    """Cuts that are fewer than ``num_per_trace``, over all traces of known problems, because a
    trace has too few token positions; cuts of one trace are always distinct."""

    num_prefixes: int
    """Prefixes returned."""

    num_answer_in_prefix: int
    """Prefixes that already state the reference answer: kept and flagged, or dropped."""

    num_dropped: int
    """Prefixes dropped because they state the answer (policy ``drop``)."""

    num_reduced_budget: int
    """Prefixes after which fewer than ``max_completion_tokens`` fit into ``max_total_tokens``."""

    prefix_tokens_mean: float
    """Mean length of the prefixes returned; 0 without any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cut:
    """One prefix before it is checked."""

    trace: Trace
    problem: Problem
    num_tokens: int

    def item(self, *, has_answer: bool) -> PrefixedProblem:
        trace = self.trace
        return PrefixedProblem(
            prefixed_problem_id=f"{trace.problem_id}#{trace.trace_id}@{self.num_tokens}",
            problem=self.problem,
            prompt_token_ids=trace.prompt_token_ids,
            prefix_token_ids=trace.completion_token_ids[: self.num_tokens],
            trace_id=trace.trace_id,
            fraction=self.num_tokens / len(trace.completion_token_ids),
            answer_in_prefix=has_answer,
        )


def answer_finder(verifier: Verifier, renderer: PromptRenderer) -> FindsAnswer:
    """Return a ``FindsAnswer`` that decodes the prefixes and asks the verifier."""

    def finds_answer(items: Sequence[tuple[str, tuple[int, ...]]]) -> list[bool]:
        return verifier.find_answer([(answer, renderer.decode(ids)) for answer, ids in items])

    return finds_answer


def cut_prefixes(
    traces: Sequence[Trace],
    problems: Sequence[Problem],
    config: PrefixConfig,
    *,
    max_total_tokens: int,
    max_completion_tokens: int,
    finds_answer: FindsAnswer,
) -> tuple[list[PrefixedProblem], PrefixStats]:
    """Cut ``num_per_trace`` prefixes from every trace of a known problem.

    Lengths are drawn uniformly and without repetition from the integers between
    ``ceil(min_fraction * L)`` and ``floor(max_fraction * L)``, L the trace's tokens, at least 1
    and at most L - 1, so that the end token is never part of a prefix. The draw depends on the
    seed and the trace id only. A trace with fewer positions than ``num_per_trace`` gives one
    prefix per position.

    Args:
        traces: in the order in which the prefixes are returned; those of one trace ascend.
        problems: the problems to train on.
        config: how many, where, and what happens to prefixes that state the answer.
        max_total_tokens: prompt, prefix and completion together.
        max_completion_tokens: completion budget, for counting prefixes that reduce it.
        finds_answer: decides ``answer_in_prefix``; called once.

    Raises:
        ValueError: if a prompt + trace is longer than ``max_total_tokens`` (so that every prefix
            leaves room for a completion), or no trace has a known problem.
    """
    by_id = {problem.problem_id: problem for problem in problems}
    known = [trace for trace in traces if trace.problem_id in by_id]
    _check_known(traces, known, by_id)
    _check_trace_lengths(known, max_total_tokens)
    positions = [cut_positions(trace, config) for trace in known]
    cuts = [
        _Cut(trace=trace, problem=by_id[trace.problem_id], num_tokens=num_tokens)
        for trace, lengths in zip(known, positions, strict=True)
        for num_tokens in lengths
    ]
    has_answer = finds_answer(
        [(c.problem.answer, c.trace.completion_token_ids[: c.num_tokens]) for c in cuts]
    )
    items = [cut.item(has_answer=found) for cut, found in zip(cuts, has_answer, strict=True)]
    kept = [i for i in items if config.answer_in_prefix == "keep" or not i.answer_in_prefix]
    num_wanted = config.num_per_trace * len(known)
    stats = PrefixStats(
        num_traces=len(traces),
        num_traces_without_problem=len(traces) - len(known),
        num_traces_without_cut=sum(not lengths for lengths in positions),
        num_missing_cuts=num_wanted - len(cuts),
        num_prefixes=len(kept),
        num_answer_in_prefix=sum(has_answer),
        num_dropped=len(items) - len(kept),
        num_reduced_budget=sum(
            len(item.context_token_ids) + max_completion_tokens > max_total_tokens for item in kept
        ),
        prefix_tokens_mean=sum(len(i.prefix_token_ids) for i in kept) / len(kept) if kept else 0.0,
    )
    _log(stats)
    return kept, stats


def cut_positions(trace: Trace, config: PrefixConfig) -> tuple[int, ...]:
    """Return the prefix lengths of one trace, ascending and distinct, in tokens."""
    num_tokens = len(trace.completion_token_ids)
    # Fractions of the decimal text: in floating point 0.55 * 100 lies above 55.
    low = max(1, math.ceil(Fraction(str(config.min_fraction)) * num_tokens))
    high = min(num_tokens - 1, math.floor(Fraction(str(config.max_fraction)) * num_tokens))
    num_positions = high - low + 1
    if num_positions <= 0:
        return ()
    digest = hashlib.sha256(trace.trace_id.encode()).digest()
    rng = np.random.default_rng([config.seed, *np.frombuffer(digest, dtype="<u4").tolist()])
    count = min(config.num_per_trace, num_positions)
    drawn = low + rng.choice(num_positions, size=count, replace=False)
    return tuple(sorted(drawn.tolist()))


def _check_known(
    traces: Sequence[Trace], known: Sequence[Trace], problems: Mapping[str, Problem]
) -> None:
    """Refuse to cut nothing at all."""
    if not traces:
        raise ValueError(
            "prefixes: the trace store has no traces; collect or import some first, or lower the "
            "problems' difficulty"
        )
    if not known:
        raise ValueError(
            f"prefixes: none of the {len(traces)} traces belongs to one of the {len(problems)} "
            f"problems (first trace: problem {traces[0].problem_id!r}); data.problems and "
            "data.traces do not belong together"
        )


def _check_trace_lengths(traces: Sequence[Trace], max_total_tokens: int) -> None:
    """Refuse traces that are longer than the context."""
    too_long = [
        f"{t.trace_id!r}: {len(t.prompt_token_ids)} prompt + {len(t.completion_token_ids)} tokens"
        for t in traces
        if t.num_tokens > max_total_tokens
    ]
    _raise_if_any(
        too_long,
        len(traces),
        f"traces are longer than rollout.max_total_tokens = {max_total_tokens}",
        "raise it, or leave such traces out when importing",
    )


def check_room(prefixed: Sequence[PrefixedProblem], max_total_tokens: int) -> None:
    """Refuse prefixes after which not even one token fits.

    Freshly cut prefixes always leave room; stored ones may not, when the limit was lowered since.

    Raises:
        ValueError: with the lengths of the first of them.
    """
    no_room = [
        f"{item.prefixed_problem_id!r}: {len(item.prompt_token_ids)} prompt + "
        f"{len(item.prefix_token_ids)} prefix tokens"
        for item in prefixed
        if len(item.context_token_ids) >= max_total_tokens
    ]
    _raise_if_any(
        no_room,
        len(prefixed),
        f"prefixes leave no room for a completion in rollout.max_total_tokens = {max_total_tokens}",
        "raise it, or cut again with a lower prefixes.max_fraction",
    )


def _raise_if_any(faults: Sequence[str], num_all: int, what: str, remedy: str) -> None:
    """Raise one error that lists the first faults."""
    if faults:
        shown = "; ".join(faults[:_NUM_SHOWN])
        more = f"; and {len(faults) - _NUM_SHOWN} more" if len(faults) > _NUM_SHOWN else ""
        raise ValueError(f"{len(faults)} of {num_all} {what} ({shown}{more}); {remedy}")


def _log(stats: PrefixStats) -> None:
    """Say what was cut, and warn of what was not."""
    _logger.info(
        "%d prefixes from %d traces, mean %.1f tokens; %d state the answer already, %d dropped",
        stats.num_prefixes,
        stats.num_traces,
        stats.prefix_tokens_mean,
        stats.num_answer_in_prefix,
        stats.num_dropped,
    )
    for count, what in (
        (stats.num_traces_without_problem, "traces of problems that are not trained on"),
        (stats.num_missing_cuts, "cuts missing because traces are too short"),
        (stats.num_reduced_budget, "prefixes reduce the completion budget"),
    ):
        if count:
            _logger.warning("prefixes: %d %s", count, what)
