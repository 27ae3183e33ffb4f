"""``prefixrl collect``: rejection sampling until one verified trace per problem, or a cap.

Every try is charged, the failed ones too: 2ND FLOPs with D the prompt and completion tokens. What a
round has found is written to the trace store while others of the round are sampled: a killed
collection loses the tries under way and ``collect.keep_seconds`` of others at most, which are made
again and not charged. Each problem's tries have seeds of their own, so that one that was killed
finds what an undisturbed one would have found (where the engine honours seeds).
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from prefixrl_mcore.accounting.flops import sampling_flops
from prefixrl_mcore.accounting.parameters import count_parameters
from prefixrl_mcore.checkpoint.convert.hf_folder import digest_of_weights
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.run import CollectConfig, RunConfig
from prefixrl_mcore.data.problem_sets import read_training_problems
from prefixrl_mcore.data.trace_schema import AttemptRecord, TraceRecord
from prefixrl_mcore.data.traces import TraceStore, build_trace_id
from prefixrl_mcore.eval.ending import exits_at_signals
from prefixrl_mcore.eval.runner import Evaluator
from prefixrl_mcore.eval.setup import build_evaluator
from prefixrl_mcore.observability.progress import Progress
from prefixrl_mcore.observability.run_folder import RunFolder
from prefixrl_mcore.records import PrefixedProblem, Rollout, ScoredRollout
from prefixrl_mcore.rollout.engine import SampleRequest
from prefixrl_mcore.rollout.sampling import group_request, sample_groups
from prefixrl_mcore.rollout.scoring import score_groups
from prefixrl_mcore.trainer.trace_commands import print_stats

logger = logging.getLogger(__name__)


def collect(config: RunConfig) -> None:
    """Sample until every training problem has a trace or has used up its tries.

    Problems that found none are kept in the store with their cost. Calling it again continues.

    Raises:
        ValueError: if the store belongs to another tokenizer, template or model.
    """
    start = time.perf_counter()
    folder = RunFolder(config.run_folder)
    training_problems = read_training_problems(config)
    folder.check(config)
    with ExitStack() as stack:
        logger.info(
            "%d problems, at most %d completions",
            len(training_problems),
            config.collect.most_completions(len(training_problems)),
        )
        stack.enter_context(exits_at_signals())
        evaluator = stack.enter_context(
            build_evaluator(
                config,
                model_folder=config.model.path,
                temperature=config.collect.temperature,
                logs_folder=folder.logs / "collect",
                problems=training_problems,
            )
        )
        folder.claim(config)
        stack.callback(lambda: folder.add_stage_seconds("collect", time.perf_counter() - start))
        store = TraceStore.open_or_create(
            config.traces_folder,
            tokenizer_hash=evaluator.renderer.tokenizer_hash,
            chat_template_hash=evaluator.renderer.chat_template_hash,
            model=str(config.model.path),
        )
        weights_hash = digest_of_weights(config.model.path)
        _check_same_weights(store, weights_hash, config.model.path)
        problems = evaluator.plain_starts(training_problems)
        progress = stack.enter_context(
            Progress("collect", total=len(problems), file=folder.path / "progress-collect.json")
        )
        collector = Collector(
            settings=config.collect,
            evaluator=evaluator,
            store=store,
            source_model=str(config.model.path),
            weights_hash=weights_hash,
            num_parameters=count_parameters(config.model.path),
        )
        while collector.sample_round(problems, progress):
            pass
    print_stats(store, Console(stderr=True))


def _check_same_weights(store: TraceStore, weights_hash: str, model_folder: Path) -> None:
    """Refuse to add traces of other weights to a collection; imported traces do not matter.

    Raises:
        ConfigError: naming both.
    """
    for record in store.traces():
        if record.weights_hash and record.weights_hash != weights_hash:
            raise ConfigError(
                f"trace store {store.folder}: was collected with weights "
                f"{record.weights_hash[:12]} ({record.source_model}), {model_folder} has "
                f"{weights_hash[:12]}; collect into another data.traces"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Collector:
    """Samples rounds of tries and writes them to the store."""

    settings: CollectConfig
    """Tries per round and in all."""

    evaluator: Evaluator
    """Engine, verifier and prompts."""

    store: TraceStore
    """Receives traces and costs."""

    source_model: str
    """Path of the sampled model."""

    weights_hash: str
    """Hash of its weights."""

    num_parameters: int
    """N of 2ND."""

    def sample_round(self, problems: Sequence[PrefixedProblem], progress: Progress) -> bool:
        """Sample one round over problems that are still open; return False when there are none."""
        spent = self._show(progress)
        chosen = self._open(problems, spent)[: self.settings.problems_per_round]
        if not chosen:
            return False
        progress.update(waiting_for=f"tries at {len(chosen)} open problems")
        requests = [self._request(item, _tries(spent, item)) for item in chosen]
        last = time.perf_counter()

        def keep(groups: Mapping[int, Sequence[Rollout]]) -> None:
            nonlocal last
            scored = score_groups(
                list(groups.values()), self.evaluator.verifier, self.evaluator.renderer
            )
            now = time.perf_counter()
            attempts = [self._attempt(group, (now - last) / len(groups)) for group in scored]
            last = now
            traces = [
                self._trace(group, spent, attempt, seed=requests[index].seed)
                for index, group, attempt in zip(groups, scored, attempts, strict=True)
                if attempt.is_solved
            ]
            self.store.append(traces, attempts)
            self._show(progress)

        sample_groups(
            self.evaluator.engine,
            chosen,
            requests,
            self.evaluator.params,
            on_groups=keep,
            keep_seconds=self.settings.keep_seconds,
        )
        return True

    def _request(self, item: PrefixedProblem, num_tries: int) -> SampleRequest:
        """Return the request for a problem's next tries; its seed depends on the problem alone."""
        return group_request(
            item,
            0,
            group_size=min(self.settings.tries_per_round, self.settings.max_tries - num_tries),
            label=f"collect/{item.problem.problem_id}/{num_tries}",
            seed=self.settings.seed,
        )

    def _show(self, progress: Progress) -> dict[str, AttemptRecord]:
        """Show what the store holds; return problem id → what was spent on it."""
        spent = {attempt.problem_id: attempt for attempt in self.store.attempts()}
        progress.update(
            sum(attempt.is_solved for attempt in spent.values()),
            tries=sum(attempt.num_tries for attempt in spent.values()),
            flops=sum(attempt.flops for attempt in spent.values()),
        )
        return spent

    def _open(
        self, problems: Sequence[PrefixedProblem], spent: dict[str, AttemptRecord]
    ) -> list[PrefixedProblem]:
        """Return the problems that have neither a trace nor used up their tries."""
        return [
            item
            for item in problems
            if not _is_solved(spent, item) and _tries(spent, item) < self.settings.max_tries
        ]

    def _attempt(self, group: Sequence[ScoredRollout], seconds: float) -> AttemptRecord:
        """Return what a round spent on one problem."""
        num_tokens = sum(
            len(scored.rollout.prefixed_problem.prompt_token_ids)
            + len(scored.rollout.completion.token_ids)
            for scored in group
        )
        return AttemptRecord(
            problem_id=group[0].rollout.prefixed_problem.problem.problem_id,
            num_tries=len(group),
            num_tokens=num_tokens,
            flops=sampling_flops(self.num_parameters, num_tokens),
            seconds=seconds,
            is_solved=any(scored.verdict.reward > 0 for scored in group),
        )

    def _trace(
        self,
        group: Sequence[ScoredRollout],
        spent: dict[str, AttemptRecord],
        attempt: AttemptRecord,
        *,
        seed: int,
    ) -> TraceRecord:
        """Return the round's first correct completion, with the cost of all tries so far."""
        rollout = next(scored.rollout for scored in group if scored.verdict.reward > 0)
        completion, start = rollout.completion, rollout.prefixed_problem
        before = spent.get(attempt.problem_id)
        return TraceRecord(
            trace_id=build_trace_id(attempt.problem_id, completion.token_ids),
            problem_id=attempt.problem_id,
            prompt_token_ids=start.prompt_token_ids,
            completion_token_ids=completion.token_ids,
            rollout_logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            sampler=self.evaluator.engine.name,
            source_model=self.source_model,
            policy_version=completion.policy_version,
            weights_hash=self.weights_hash,
            temperature=self.settings.temperature,
            seed=seed,
            verifier=self.evaluator.verifier.name,
            tokenizer_hash=self.store.header.tokenizer_hash,
            chat_template_hash=self.store.header.chat_template_hash,
            num_tries=attempt.num_tries + (before.num_tries if before else 0),
            flops=attempt.flops + (before.flops if before else 0.0),
            seconds=attempt.seconds + (before.seconds if before else 0.0),
        )


def _tries(spent: dict[str, AttemptRecord], item: PrefixedProblem) -> int:
    """Return the tries that a problem has had."""
    attempt = spent.get(item.problem.problem_id)
    return attempt.num_tries if attempt else 0


def _is_solved(spent: dict[str, AttemptRecord], item: PrefixedProblem) -> bool:
    """Return whether a problem has a trace."""
    attempt = spent.get(item.problem.problem_id)
    return attempt is not None and attempt.is_solved
