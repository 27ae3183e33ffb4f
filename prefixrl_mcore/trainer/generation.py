"""What a step trains on: groups of rollouts, sampled, verified and given their advantages.

``Generator`` does the work, on rank 0. ``[rollout.schedule]`` decides which groups it begins, which
it keeps, and what happens with the rest.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.data.source import MixtureSource
from prefixrl_mcore.eval.runner import Evaluator
from prefixrl_mcore.observability.phases import Phases
from prefixrl_mcore.records import Group, StartedGroup
from prefixrl_mcore.rollout.engine import SamplingParams
from prefixrl_mcore.rollout.group_sampling import SampledGroups, sample_started
from prefixrl_mcore.rollout.interruption import SamplingInterrupted
from prefixrl_mcore.rollout.scoring import score_groups
from prefixrl_mcore.trainer.groups import with_advantages

OVERSAMPLING_METRICS = (
    "rollout/num_begun_groups",
    "rollout/num_aborted_groups",
    "rollout/discarded_tokens",
)
PARTIAL_METRICS = (
    "rollout/num_carried_groups",
    "rollout/num_continued_groups",
    "rollout/num_expired_groups",
)
DYNAMIC_METRICS = (
    "rollout/num_rounds",
    "rollout/num_dropped_groups",
    "rollout/num_filled_groups",
)


class StalenessError(RuntimeError):
    """A rollout is of other weights than the run allows; raised on every rank alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """What one step trains on, and what it cost to sample."""

    step: int
    """The step that trains on it."""

    groups: tuple[Group, ...]
    """[prompts_per_step] the batch."""

    dropped: tuple[Group, ...]
    """Further groups, verified and without signal, that are charged and logged only."""

    num_sampled_tokens: int
    """Context and completion tokens of everything that was sampled, aborted and dropped too."""

    num_cached_tokens: int
    """Those of them that the engine took from its KV cache."""

    num_new_tokens: int
    """Completion tokens of everything that was sampled."""

    sample_seconds: float
    """Wall time of the engine."""

    seconds: float
    """Wall time of sampling and verification."""

    figures: dict[str, float]
    """``rollout/...`` metrics of the modes in use."""


@dataclass(kw_only=True, slots=True)
class _Tally:
    """What happened while a step was sampled."""

    kept: list[Group] = field(default_factory=list)
    dropped: list[Group] = field(default_factory=list)
    num_sampled_tokens: int = 0
    num_cached_tokens: int = 0
    num_new_tokens: int = 0
    sample_seconds: float = 0.0
    num_rounds: int = 0
    num_begun: int = 0
    num_aborted: int = 0
    discarded_tokens: int = 0
    num_continued: int = 0
    num_expired: int = 0
    num_filled: int = 0

    def thrown_away_with(self, interruption: SamplingInterrupted) -> SamplingInterrupted:
        """Return the interruption of a later round, with what the rounds before sampled."""
        return SamplingInterrupted(
            self.num_sampled_tokens + interruption.num_tokens,
            self.num_new_tokens + interruption.num_new_tokens,
            self.num_cached_tokens + interruption.num_cached_tokens,
        )


class Generator:
    """Samples and verifies the groups of each step, in the order of the source."""

    def __init__(self, evaluator: Evaluator, source: MixtureSource, run: RunConfig) -> None:
        """Begin with nothing carried over.

        Args:
            evaluator: engine, verifier and prompts.
            source: what the groups start from; taken from here only.
            run: the run's settings.
        """
        self.carried: list[StartedGroup] = []
        """Groups that go on in the next step, oldest first; empty without ``partial``."""
        self._evaluator = evaluator
        self._source = source
        self._run = run
        self._schedule = run.rollout.schedule

    def generate(
        self, step: int, *, phases: Phases, on_wait: Callable[[str], None] = lambda what: None
    ) -> Generated:
        """Sample and verify the groups of a step, with the weights that the engine holds.

        With ``dynamic_sampling`` in rounds: each round samples as many groups as still lack. What
        lacks after the last one is filled up with groups without signal, in the order in which they
        were sampled.

        Args:
            step: names the rollouts.
            phases: of the calling thread; verification is a phase of its own.
            on_wait: told what is waited for.

        Raises:
            SamplingInterrupted: if the engine's sampling was; with the rounds before.
            Exception: of the engine or the verifier. In any case nothing is taken from the source
                then, and what was carried over still is.
        """
        source, carried, tally = self._source.state(), self.carried, _Tally()
        try:
            return self._generate(step, tally, phases, on_wait)
        except BaseException as error:
            self._source.load_state(source)
            self.carried = carried
            if isinstance(error, SamplingInterrupted) and tally.num_rounds:
                raise tally.thrown_away_with(error) from error
            raise

    def _generate(
        self, step: int, tally: _Tally, phases: Phases, on_wait: Callable[[str], None]
    ) -> Generated:
        """Do the work of ``generate``."""
        start = time.perf_counter()
        wanted = self._run.batch.prompts_per_step
        while len(tally.kept) < wanted and tally.num_rounds < self._schedule.num_rounds:
            label = f"{step}+{tally.num_rounds}" if tally.num_rounds else str(step)
            on_wait("rollouts")
            finished = self._sample_round(wanted - len(tally.kept), label, tally)
            tally.num_rounds += 1
            on_wait("verifier")
            with phases.phase("verify"):
                sampled = [group.rollouts() for group in finished]
                scored = score_groups(sampled, self._evaluator.verifier, self._evaluator.renderer)
            for group in with_advantages(scored, self._run.loss):
                is_kept = not self._schedule.dynamic_sampling or group.has_signal
                (tally.kept if is_kept else tally.dropped).append(group)
        tally.num_filled = wanted - len(tally.kept)
        groups = (*tally.kept, *tally.dropped[: tally.num_filled])
        return Generated(
            step=step,
            groups=groups,
            dropped=tuple(tally.dropped[tally.num_filled :]),
            num_sampled_tokens=tally.num_sampled_tokens,
            num_cached_tokens=tally.num_cached_tokens,
            num_new_tokens=tally.num_new_tokens,
            sample_seconds=tally.sample_seconds,
            seconds=time.perf_counter() - start,
            figures=self._figures(tally),
        )

    def _sample_round(self, num_wanted: int, label: str, tally: _Tally) -> list[StartedGroup]:
        """Return ``num_wanted`` finished groups, in the order in which they were begun."""
        num_begun = self._schedule.num_begun(num_wanted)
        started = self._take(num_begun, label, tally)
        start = time.perf_counter()
        sampled = sample_started(
            self._evaluator.engine,
            started,
            sampling_params(self._evaluator, self._run),
            num_wanted=num_wanted,
            group_size=self._run.batch.group_size,
            label=label,
            seed=self._run.seed,
        )
        tally.sample_seconds += time.perf_counter() - start
        tally.num_begun += num_begun
        tally.num_sampled_tokens += sampled.num_tokens
        tally.num_cached_tokens += sampled.num_cached_tokens
        tally.num_new_tokens += sampled.num_new_tokens
        chosen = sorted(sampled.finished[:num_wanted])
        tally.num_continued += sum(bool(started[index].num_tokens) for index in chosen)
        self._put_aside(sampled, set(chosen), tally)
        return [sampled.groups[index] for index in chosen]

    def _take(self, count: int, label: str, tally: _Tally) -> list[StartedGroup]:
        """Return the next groups to be sampled: carried ones first, then those of the source."""
        continued, self.carried = self.carried[:count], self.carried[count:]
        continued = [self._without_expired(group, tally) for group in continued]
        if len(continued) == count:
            return continued
        new = [
            StartedGroup(group_id=f"{label}/{index}", prefixed_problem=prefixed_problem)
            for index, prefixed_problem in enumerate(
                self._source.take(count - len(continued)), start=len(continued)
            )
        ]
        return [*continued, *new]

    def _without_expired(self, group: StartedGroup, tally: _Tally) -> StartedGroup:
        """Return a carried group, without its tokens if they were too old at the update."""
        oldest = group.oldest_version
        update_version = self._evaluator.engine.policy_version + int(self._schedule.overlap)
        if oldest is None or update_version - oldest <= self._schedule.max_staleness:
            return group
        tally.num_expired += 1
        tally.discarded_tokens += group.num_tokens
        return replace(group, completions=())

    def _put_aside(self, sampled: SampledGroups, chosen: set[int], tally: _Tally) -> None:
        """Carry over what did not make the batch, or give its problems back to the source."""
        rest = [group for index, group in enumerate(sampled.groups) if index not in chosen]
        tally.num_aborted += len(rest)
        carried = [group for group in rest if self._schedule.partial and group.num_tokens]
        returned = [group for group in rest if not (self._schedule.partial and group.num_tokens)]
        self.carried = carried + self.carried
        self._source.give_back(group.prefixed_problem for group in returned)
        tally.discarded_tokens += sum(group.num_tokens for group in returned)

    def _figures(self, tally: _Tally) -> dict[str, float]:
        """Return the metrics of the modes in use."""
        schedule, figures = self._schedule, dict[str, float]()
        if schedule.oversampling > 1.0:
            counts = (tally.num_begun, tally.num_aborted, tally.discarded_tokens)
            figures |= zip(OVERSAMPLING_METRICS, map(float, counts), strict=True)
        if schedule.partial:
            counts = (len(self.carried), tally.num_continued, tally.num_expired)
            figures |= zip(PARTIAL_METRICS, map(float, counts), strict=True)
        if schedule.dynamic_sampling:
            num_dropped = len(tally.dropped) - tally.num_filled
            counts = (tally.num_rounds, num_dropped, tally.num_filled)
            figures |= zip(DYNAMIC_METRICS, map(float, counts), strict=True)
        return figures


def sampling_params(evaluator: Evaluator, run: RunConfig) -> SamplingParams:
    """Return how to sample in training: at the run's temperature instead of the evaluation's."""
    return replace(evaluator.params, temperature=run.rollout.temperature)


def staleness_metrics(
    groups: Sequence[Group], policy_version: int, *, max_staleness: int
) -> dict[str, float]:
    """Return mean and maximum of the staleness of the tokens to be trained on.

    Args:
        groups: of a step.
        policy_version: of the weights that they are to be trained on.
        max_staleness: what is allowed; 0 is strictly on-policy.

    Raises:
        StalenessError: naming a rollout that is more stale, or of weights that do not exist yet.
    """
    num_tokens, total, largest = 0, 0, 0
    for group in groups:
        for scored in group.rollouts:
            for span in scored.rollout.completion.version_spans:
                staleness = policy_version - span.policy_version
                if not 0 <= staleness <= max_staleness:
                    raise StalenessError(
                        f"rollout {scored.rollout.rollout_id}: {span.num_tokens} of its tokens are "
                        f"of policy version {span.policy_version}, the policy is at "
                        f"{policy_version}, and rollout.schedule.max_staleness allows "
                        f"{max_staleness}: the weight sync did not take effect"
                    )
                num_tokens += span.num_tokens
                total += staleness * span.num_tokens
                largest = max(largest, staleness)
    return {
        "rollout/staleness_mean": total / num_tokens,
        "rollout/staleness_max": float(largest),
    }
