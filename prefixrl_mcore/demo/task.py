"""The demo's task folder: rules, base policy, hard training problems, held-out problems."""

import logging
from collections.abc import Callable, Sequence

from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.demo.base_policy import BasePolicySettings, build_base_policy
from prefixrl_mcore.demo.quiz import draw_problem_sets, write_problems
from prefixrl_mcore.demo.selection import select_hard_problems
from prefixrl_mcore.demo.settings import TaskConfig
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
    rollout = run.rollout.model_copy(update={"engine": "transformers"})
    config = run.model_copy(update={"rollout": rollout})
    with build_evaluator(
        config,
        model_folder=run.model.path,
        temperature=1.0,
        logs_folder=run.model.path.parent / "logs",
        problems=candidates,
    ) as evaluator:
        num_screened = 0

        def count_solved(problems: Sequence[Problem], num_tries: int) -> Sequence[int]:
            nonlocal num_screened
            on_progress("screening for hard problems", num_screened, task.num_problems)
            num_screened += len(problems)
            starts = evaluator.plain_starts(problems)
            label = f"screening/{problems[0].problem_id}"
            return evaluator.evaluate(starts, num_samples=num_tries, label=label).num_correct

        hard = select_hard_problems(
            candidates,
            count_solved,
            num_wanted=task.num_problems,
            num_tries=task.screening_samples,
        )
    logger.info(
        "base policy: %d of %d screening tries correct over %d problems",
        hard.num_correct,
        hard.num_tries,
        hard.num_screened,
    )
    return list(hard.problems)
