"""The demo's task folder: rules, base policy, hard training problems, held-out problems."""

import logging
from collections.abc import Callable, Sequence

from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.demo.base_policy import BasePolicySettings, build_base_policy
from prefixrl_mcore.demo.quiz import draw_problem_sets, write_problems
from prefixrl_mcore.demo.settings import TaskConfig
from prefixrl_mcore.eval.runner import Evaluator
from prefixrl_mcore.eval.setup import build_evaluator
from prefixrl_mcore.records import Problem

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int], None]
"""Called with (what is done, units done, units in all)."""


def build_task(task: TaskConfig, run: RunConfig, *, on_progress: OnProgress) -> None:
    """Write the base policy and the problem files that ``run`` names; done parts are kept.

    Args:
        task: rules, sizes, seeds.
        run: names the folders and files to write, and how the screening samples.
        on_progress: called as the work goes on.
    """
    if not run.model.path.exists():
        build_base_policy(
            task.quiz,
            BasePolicySettings(
                num_steps=task.base_steps, sound_probability=task.sound_probability, seed=task.seed
            ),
            run.model.path,
            on_progress=lambda p: on_progress(f"base policy, {p.phase}", p.step, p.num_steps),
        )
    (held_out_file,) = run.data.held_out.values()
    if run.data.problems.exists() and held_out_file.exists():
        return
    sizes = {"held-out": task.num_held_out, "train": 4 * task.num_problems}
    problems = draw_problem_sets(task.quiz, sizes, seed=task.seed)
    hard = _screen(task, run, problems["train"], on_progress)
    write_problems(held_out_file, problems["held-out"])
    write_problems(run.data.problems, hard)


def _screen(
    task: TaskConfig, run: RunConfig, candidates: Sequence[Problem], on_progress: OnProgress
) -> list[Problem]:
    """Return the first ``num_problems`` candidates that the base policy never solves.

    Raises:
        ValueError: if there are too few such candidates.
    """
    hard: list[Problem] = []
    rollout = run.rollout.model_copy(update={"engine": "transformers"})
    config = run.model_copy(update={"rollout": rollout})
    logs = run.model.path.parent / "logs"
    with build_evaluator(
        config, model_folder=run.model.path, temperature=1.0, logs_folder=logs, problems=candidates
    ) as evaluator:
        for start in range(0, len(candidates), task.num_problems):
            chunk = candidates[start : start + task.num_problems]
            hard += _unsolved(evaluator, chunk, task.screening_samples)
            on_progress("hard problems", min(len(hard), task.num_problems), task.num_problems)
            if len(hard) >= task.num_problems:
                return hard[: task.num_problems]
    raise ValueError(
        f"demo task: only {len(hard)} of {len(candidates)} problems stay unsolved in "
        f"{task.screening_samples} samples, {task.num_problems} are needed; "
        "lower sound_probability or raise num_parts"
    )


def _unsolved(evaluator: Evaluator, problems: Sequence[Problem], num_samples: int) -> list[Problem]:
    """Return the problems without a correct completion in ``num_samples``."""
    label = f"screening/{problems[0].problem_id}"
    starts = evaluator.plain_starts(problems)
    result = evaluator.evaluate(starts, num_samples=num_samples, label=label)
    return [p for p, count in zip(problems, result.num_correct, strict=True) if count == 0]
