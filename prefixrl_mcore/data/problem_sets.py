"""The problems of a run: those that are trained on, and the sets that are evaluated."""

from pathlib import Path

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.data.problems import read_problems
from prefixrl_mcore.records import Problem

TRAINING_SET = "train"
"""Name of the training problems among the evaluated sets."""


def read_training_problems(config: RunConfig) -> list[Problem]:
    """Return the training problems of the config."""
    return _read(config, config.data.problems, max_problems=config.data.max_problems)


def read_evaluation_sets(config: RunConfig) -> dict[str, list[Problem]]:
    """Return name → problems: ``train`` first, then the held-out sets.

    Raises:
        ConfigError: if a held-out set is named ``train``, or shares a problem with training.
    """
    data = config.data
    sets = {TRAINING_SET: read_training_problems(config)}
    training_texts = {problem.text for problem in sets[TRAINING_SET]}
    for name, path in data.held_out.items():
        if name in sets:
            raise ConfigError("data.held_out: the name 'train' is taken; choose another")
        sets[name] = _read(config, path, max_problems=None)
        shared = [p.problem_id for p in sets[name] if p.text in training_texts]
        if shared:
            raise ConfigError(
                f"data.held_out.{name} ({path}): {len(shared)} problems are also trained on "
                f"(first: {shared[0]}); remove them from one of the files"
            )
    return sets


def _read(config: RunConfig, path: Path, *, max_problems: int | None) -> list[Problem]:
    data = config.data
    return read_problems(
        path,
        id_field=data.id_field,
        text_field=data.text_field,
        answer_field=data.answer_field,
        answer_format=data.answer_format,
        max_problems=max_problems,
    )
