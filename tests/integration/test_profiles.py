"""Traces of chosen steps, as ``prefixrl train --profile`` writes them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.config.base import ConfigError, validate
from prefixrl_mcore.config.run import RunConfig
from tests.support.tiny_run import TinyTask, metrics_of

IN_EVERY_STEP = ("sync", "rollout", "verify", "pack", "forward_backward", "optimizer")


def _ranges(path: Path) -> list[dict[str, Any]]:
    """Return the named ranges of a trace."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return [event for event in events if event.get("cat") == "user_annotation"]


def test_a_profiled_step_has_a_trace_with_its_phases(tiny_task: TinyTask, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert tiny_task.run("train --profile 1", run, "--trainer.num-steps", "2") == 0
    assert [path.name for path in (run / "profile").iterdir()] == ["step-000001-rank-00000.json.gz"]
    ranges = _ranges(run / "profile" / "step-000001-rank-00000.json.gz")
    names = {event["name"] for event in ranges}
    assert names >= {"step 1", *IN_EVERY_STEP}
    assert "eval" not in names  # what follows the step is not in it
    seconds = dict.fromkeys(names, 0.0)
    for event in ranges:
        seconds[event["name"]] += event["dur"] / 1e6
    line = metrics_of(run, "train")[1]
    for name in ("forward_backward", "optimizer"):  # the range is within what is timed
        assert 0.0 < seconds[name] < line[f"time/{name}_seconds"] + 0.001
    assert seconds["rollout"] >= seconds["verify"]  # one within the other
    config = json.loads((run / "config.json").read_text())
    assert config["profile"]["steps"] == [1]
    heartbeat = json.loads((run / "heartbeats" / "rank-00000.json").read_text())
    assert (heartbeat["rank"], heartbeat["answers"]) == (0, 0)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"steps": (3, 4)}, r"profile.steps must be below trainer.num_steps = 4, got \[4\]"),
        ({"ranks": (0, 1)}, r"profile.ranks must be below .*policy.parallel = 1, got \[1\]"),
    ],
)
def test_a_step_or_rank_that_is_not_there_is_refused(
    tmp_path: Path, profile: dict[str, Any], message: str
) -> None:
    values = {
        "run_folder": tmp_path,
        "model": {"path": "models/x"},
        "data": {"problems": "x.jsonl"},
        "trainer": {"num_steps": 4},
    }
    assert validate(RunConfig, values, where="test").profile.steps == ()
    with pytest.raises(ConfigError, match=message):
        validate(RunConfig, values | {"profile": profile}, where="test")
