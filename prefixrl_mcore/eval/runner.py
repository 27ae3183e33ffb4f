"""Evaluation of the weights that an engine holds: problem sets, prefix bins, unlock curve."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from prefixrl_mcore.data.prompts import PromptRenderer
from prefixrl_mcore.data.source import original_problems
from prefixrl_mcore.eval.parts import Part
from prefixrl_mcore.eval.pass_at_k import PrefixBin, accuracy_with_stderr
from prefixrl_mcore.records import PrefixedProblem, Problem, Rollout, Trace
from prefixrl_mcore.rewards.base import Verifier
from prefixrl_mcore.rollout.engine import RolloutEngine, SamplingParams
from prefixrl_mcore.rollout.sampling import derive_seed, group_request, sample_groups
from prefixrl_mcore.rollout.scoring import score_groups


@dataclass(frozen=True, kw_only=True, slots=True)
class StartResult:
    """What came of one evaluated context."""

    num_correct: int
    """Correct samples."""

    completion_tokens: int
    """Tokens of all samples."""


StartResults = Mapping[int, StartResult]
"""Index of a context in its evaluation → what came of it."""

OnResults = Callable[[StartResults], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """Correct samples of each evaluated context."""

    num_correct: tuple[int, ...]
    """[num_problems] correct samples."""

    num_samples: int
    """Samples drawn for each."""

    completion_tokens: int
    """Tokens sampled in all."""

    @property
    def accuracy(self) -> float:
        """Mean over problems of the share of correct samples."""
        return self._accuracy_with_stderr()[0]

    @property
    def accuracy_stderr(self) -> float:
        """Standard error of the accuracy over problems; NaN for a single problem."""
        return self._accuracy_with_stderr()[1]

    def _accuracy_with_stderr(self) -> tuple[float, float]:
        """Return accuracy and its standard error over problems."""
        return accuracy_with_stderr([self.num_samples] * len(self.num_correct), self.num_correct)

    @property
    def all_negative_fraction(self) -> float:
        """Share of problems without a single correct sample."""
        return sum(count == 0 for count in self.num_correct) / len(self.num_correct)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluator:
    """Samples and verifies; holds what stays the same between evaluations of a run."""

    engine: RolloutEngine
    """Holds the weights to be evaluated."""

    verifier: Verifier
    """Judges the completions."""

    renderer: PromptRenderer
    """Renders problems and decodes tokens."""

    params: SamplingParams
    """Temperature and limits of the evaluation."""

    seed: int
    """Seed of the run; evaluations of equal label draw equal samples on seeded engines."""

    traces: dict[str, Trace] = field(default_factory=dict)
    """Problem id → trace, for prefix bins and the unlock curve; empty when there is no store."""

    def evaluate(
        self,
        starts: Sequence[PrefixedProblem],
        *,
        num_samples: int,
        label: str,
        known: StartResults | None = None,
        on_results: OnResults = lambda results: None,
        keep_seconds: float = math.inf,
    ) -> EvaluationResult:
        """Return how many of ``num_samples`` completions of each start are correct.

        Args:
            starts: contexts to sample from.
            num_samples: completions of each.
            label: names the evaluation in rollout ids and seeds.
            known: what came of some of them before, with this label: they are not sampled again.
                The seeds of the others do not depend on it.
            on_results: told what came of the others, each once, while sampling goes on.
            keep_seconds: least time between two calls of it; infinite verifies all at the end.

        Raises:
            ValueError: if there is nothing to evaluate.
        """
        if not starts:
            raise ValueError(f"evaluation {label}: no problems; give at least one")
        results = dict(known or {})
        missing = [index for index in range(len(starts)) if index not in results]

        def verify(groups: Mapping[int, Sequence[Rollout]]) -> None:
            scored = score_groups(list(groups.values()), self.verifier, self.renderer)
            new = {
                missing[position]: StartResult(
                    num_correct=sum(one.verdict.reward > 0 for one in group),
                    completion_tokens=sum(len(one.rollout.completion.token_ids) for one in group),
                )
                for position, group in zip(groups, scored, strict=True)
            }
            results.update(new)
            on_results(new)

        if missing:
            sample_groups(
                self.engine,
                [starts[index] for index in missing],
                [
                    group_request(starts[i], i, group_size=num_samples, label=label, seed=self.seed)
                    for i in missing
                ],
                self.params,
                on_groups=verify,
                keep_seconds=keep_seconds,
            )
        ordered = [results[index] for index in range(len(starts))]
        return EvaluationResult(
            num_correct=tuple(result.num_correct for result in ordered),
            num_samples=num_samples,
            completion_tokens=sum(result.completion_tokens for result in ordered),
        )

    def starts(self, part: Part, *, label: str) -> list[PrefixedProblem]:
        """Return the contexts of a part; ``label`` decides where traces are cut at random."""
        match part.prefix:
            case None:
                return self.plain_starts(part.problems)
            case PrefixBin() as prefix_bin:
                return self.starts_in_bin(part.problems, prefix_bin, label=label)
            case fraction:
                return self.starts_at(part.problems, fraction)

    def plain_starts(self, problems: Sequence[Problem]) -> list[PrefixedProblem]:
        """Return the problems without a prefix."""
        return original_problems(self.renderer.render(problem) for problem in problems)

    def starts_in_bin(
        self, problems: Sequence[Problem], prefix_bin: PrefixBin, *, label: str
    ) -> list[PrefixedProblem]:
        """Cut each problem's trace at a random token position inside the bin.

        Problems without a trace, and traces too short to have a position inside, are left out;
        the number of returned starts tells how many. The end token is never part of a prefix.
        """
        starts: list[PrefixedProblem] = []
        for problem in problems:
            trace = self.traces.get(problem.problem_id)
            if trace is None:
                continue
            num_tokens = len(trace.completion_token_ids)
            # Fractions of the decimal text: in floating point 0.7 * 90 lies below 63.
            low, high = Fraction(str(prefix_bin.low)), Fraction(str(prefix_bin.high))
            first = 0 if prefix_bin.is_no_prefix else math.floor(low * num_tokens) + 1
            last = min(math.floor(high * num_tokens), num_tokens - 1)
            if first > last:
                continue
            draw = np.random.default_rng(derive_seed(self.seed, f"{label}/{problem.problem_id}", 0))
            starts.append(prefixed_start(problem, trace, int(draw.integers(first, last + 1))))
        return starts

    def starts_at(self, problems: Sequence[Problem], fraction: float) -> list[PrefixedProblem]:
        """Cut each trace at ``fraction`` of its tokens; problems without one are left out."""
        starts: list[PrefixedProblem] = []
        for problem in problems:
            trace = self.traces.get(problem.problem_id)
            if trace is not None:
                num_tokens = len(trace.completion_token_ids)
                cut = min(round(fraction * num_tokens), num_tokens - 1)
                starts.append(prefixed_start(problem, trace, cut))
        return starts


def prefixed_start(problem: Problem, trace: Trace, cut: int) -> PrefixedProblem:
    """Return the problem continued by the first ``cut`` tokens of its trace."""
    return PrefixedProblem(
        prefixed_problem_id=f"{problem.problem_id}#{trace.trace_id}@{cut}",
        problem=problem,
        prompt_token_ids=trace.prompt_token_ids,
        prefix_token_ids=trace.completion_token_ids[:cut],
        trace_id=trace.trace_id,
        fraction=cut / len(trace.completion_token_ids),
    )
