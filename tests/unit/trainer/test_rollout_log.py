"""Rollouts become rows of text only for the steps that someone looks at."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.parquet as pq
import pytest

from prefixrl_mcore.config.run import MetricsConfig, WandbConfig
from prefixrl_mcore.observability.metrics import MetricsWriter
from prefixrl_mcore.observability.run_folder import RunFolder
from prefixrl_mcore.records import (
    Completion,
    Group,
    PrefixedProblem,
    Problem,
    Rollout,
    ScoredRollout,
    Verdict,
)
from prefixrl_mcore.trainer.session import Session


class _Services:
    """W&B where nothing is started: it notes the tables."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.Table = SimpleNamespace
        self.run = SimpleNamespace(
            step=0, define_metric=lambda *_, **__: None, log=self._log, finish=lambda: None
        )

    def init(self, **_: object) -> SimpleNamespace:
        return self.run

    def _log(self, values: dict[str, Any], **_: object) -> None:
        if "rollouts" in values:
            self.steps.append(values["step"])


def _group() -> Group:
    start = PrefixedProblem(
        prefixed_problem_id="p",
        problem=Problem(problem_id="p", text="?", answer="1"),
        prompt_token_ids=(1, 2),
        prefix_token_ids=(3,),
    )
    completion = Completion(
        token_ids=(4, 5), logprobs=(-1.0, -1.0), finish_reason="stop", policy_version=0
    )
    rollout = Rollout(rollout_id="0/0/0", prefixed_problem=start, completion=completion)
    scored = ScoredRollout(rollout=rollout, verdict=Verdict(reward=1.0, reason="correct"))
    return Group(prefixed_problem=start, rollouts=(scored,), advantages=(0.0,))


def test_rollouts_are_decoded_for_the_steps_of_tables_and_services_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, decoded = _Services(), list[tuple[int, ...]]()
    monkeypatch.setitem(sys.modules, "wandb", services)
    folder = RunFolder(tmp_path)
    folder.config_file.write_text("{}")
    config = MetricsConfig(wandb=WandbConfig(every_steps_rollouts=3), tensorboard=True)
    writer = MetricsWriter(folder, config, num_steps_done=0)

    def decode(token_ids: Sequence[int]) -> str:
        decoded.append(tuple(token_ids))
        return "text"

    session = SimpleNamespace(
        config=SimpleNamespace(trainer=SimpleNamespace(rollouts_every_steps=4)),
        folder=folder,
        renderer=SimpleNamespace(decode=decode),
    )
    rollouts = cast(Any, SimpleNamespace(groups=(_group(),), dropped=()))
    steps = []
    for step in range(7):
        num_before = len(decoded)
        Session._write_rollouts(cast(Any, session), step, rollouts, writer)
        steps += [step] * (len(decoded) > num_before)
    writer.close()
    assert steps == [0, 3, 4, 6]
    assert services.steps == [0, 3, 6]
    assert decoded[:3] == [(1, 2), (3,), (4, 5)]
    tables = sorted(folder.rollouts.iterdir())
    assert [table.name for table in tables] == ["step-000000.parquet", "step-000004.parquet"]
    assert pq.read_table(tables[1])["completion_text"].to_pylist() == ["text"]
