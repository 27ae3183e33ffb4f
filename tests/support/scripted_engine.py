"""An engine, a verifier and prompts that follow a script: lengths and rewards are known by hand.

A problem is its number, which is the only token of its prompt. The token at position ``i`` of a
completion is ``100 + i``, so that a completion that was put together of parts shows it.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.data.source import MixtureSource
from prefixrl_mcore.records import Completion, PrefixedProblem, Problem, Verdict
from prefixrl_mcore.rewards.base import VerifyRequest
from prefixrl_mcore.rollout.engine import (
    IsEnough,
    OnCompleted,
    SampleRequest,
    SamplingParams,
    never_enough,
)
from prefixrl_mcore.trainer.generation import Generator

GROUP_SIZE = 2


class ScriptedEngine:
    """Requests finish in the order of what is left of their longest completion."""

    name = "scripted 1.0"

    def __init__(self, lengths: Mapping[int, Sequence[int]]) -> None:
        """Take the lengths of each problem's completions; of others, they are 4."""
        self.policy_version = 0
        self.calls: list[list[SampleRequest]] = []
        self.lengths = dict(lengths)

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        on_completed: OnCompleted | None = None,
        is_enough: IsEnough = never_enough,
    ) -> list[list[Completion]]:
        self.calls.append(list(requests))
        rests = [self._rests(request) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: max(rests[index]))
        done: dict[int, list[Completion]] = {}
        for index in order:
            done[index] = [self._completion(requests[index], rest) for rest in rests[index]]
            if is_enough(index, done[index]):
                now = max(rests[index])
                for other in set(order) - set(done):
                    done[other] = [
                        self._completion(requests[other], rest, now=now) for rest in rests[other]
                    ]
                break
        return [done[index] for index in range(len(requests))]

    def _rests(self, request: SampleRequest) -> list[int]:
        """Return the tokens that each completion of a request still needs."""
        problem, num_so_far = request.context_token_ids[0], len(request.context_token_ids) - 1
        lengths = self.lengths.get(problem, (4,) * GROUP_SIZE)
        _, dot, sample = request.request_id.partition(".")
        if dot:
            return [lengths[int(sample)] - num_so_far]
        return list(lengths[: request.num_samples])

    def _completion(self, request: SampleRequest, rest: int, now: int | None = None) -> Completion:
        first = len(request.context_token_ids) - 1
        number = rest if now is None else min(rest, now)
        return Completion(
            token_ids=tuple(range(100 + first, 100 + first + number)),
            logprobs=(-1.0 - self.policy_version,) * number,
            finish_reason="stop" if number == rest else "abort",
            policy_version=self.policy_version,
            num_cached_tokens=1,
        )


class ScriptedVerifier:
    """Rewards the first rollout of the problems that have a signal."""

    def __init__(self, with_signal: frozenset[int] | None) -> None:
        """Take the problems with a signal; None is all."""
        self._with_signal = with_signal

    def verify(self, requests: Sequence[VerifyRequest]) -> list[Verdict]:
        return [self._verdict(request) for request in requests]

    def _verdict(self, request: VerifyRequest) -> Verdict:
        has_signal = self._with_signal is None or int(request.answer) in self._with_signal
        is_right = has_signal and request.request_id.endswith("/0")
        return Verdict(reward=float(is_right), reason="correct" if is_right else "wrong")


def scripted_config(prompts_per_step: int, **schedule: Any) -> RunConfig:
    """Return a run with groups of two and a schedule."""
    is_off_policy = schedule.get("partial") or schedule.get("overlap")
    return RunConfig.model_validate(
        {
            "run_folder": "runs/x",
            "model": {"path": "models/x"},
            "data": {"problems": "x.jsonl"},
            "loss": {"importance": "truncated" if is_off_policy else "none"},
            "rollout": {
                "max_completion_tokens": 50,
                "max_total_tokens": 60,
                "schedule": schedule,
            },
            "batch": {"prompts_per_step": prompts_per_step, "group_size": GROUP_SIZE},
        }
    )


def scripted_source(num_problems: int) -> MixtureSource:
    """Return a source over numbered problems."""
    problems = [
        PrefixedProblem(
            prefixed_problem_id=f"p{index:02d}",
            problem=Problem(problem_id=f"p{index:02d}", text="x", answer=str(index)),
            prompt_token_ids=(index,),
        )
        for index in range(num_problems)
    ]
    return MixtureSource(problems, seed=0)


def scripted_generator(
    config: RunConfig,
    source: MixtureSource,
    engine: ScriptedEngine,
    with_signal: frozenset[int] | None = None,
) -> Generator:
    """Return a generator of scripted rollouts."""
    params = SamplingParams(
        temperature=0.7,
        max_completion_tokens=config.rollout.max_completion_tokens,
        max_total_tokens=config.rollout.max_total_tokens,
        stop_token_ids=(),
    )
    renderer = SimpleNamespace(decode=str, completion_text=str)
    evaluator: Any = SimpleNamespace(
        engine=engine, verifier=ScriptedVerifier(with_signal), renderer=renderer, params=params
    )
    return Generator(evaluator, source, config)
