"""Several jobs at once: the points of a sweep, and one end for all jobs."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.site import CpuStagesConfig, SiteConfig
from prefixrl_mcore.launch.slurm import recipe, waiting
from prefixrl_mcore.launch.slurm.job_folder import JobFolder
from prefixrl_mcore.launch.slurm.launch import LaunchOptions
from prefixrl_mcore.launch.slurm.recipe import folder_suffix, follow_all, sweep_points
from prefixrl_mcore.launch.slurm.states import JobState


def test_values_are_combined() -> None:
    assert sweep_points(["a.b=1,2", "c=x,y"]) == [
        ("a.b=1", "c=x"),
        ("a.b=1", "c=y"),
        ("a.b=2", "c=x"),
        ("a.b=2", "c=y"),
    ]


def test_a_run_of_a_sweep_is_called_after_whole_values() -> None:
    assert folder_suffix(("policy.optimizer.lr=1.5e-6", "rollout.temperature=0.7")) == (
        "lr-1.5e-6-temperature-0.7"
    )
    assert folder_suffix(("data.problems=/data/a b.jsonl",)) == "problems--data-a-b.jsonl"


def test_stages_without_gpus_ask_for_what_their_part_of_the_site_says() -> None:
    site = SiteConfig(
        gpus_per_node=8,
        partition="gpu",
        qos="high",
        memory="0",
        constraint="h100",
        cpu_stages=CpuStagesConfig(partition="cpu", memory="16G"),
    )
    own = site.without_gpus()
    assert (own.gpus_per_node, own.partition, own.qos) == (0, "cpu", "high")
    assert (own.memory, own.exclusive, own.constraint) == ("16G", False, None)
    assert (site.partition, site.exclusive) == ("gpu", True)


@pytest.mark.parametrize("text", ["a", "a=", "a=1", "a=1,", "=1,2"])
def test_a_sweep_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value,value"):
        sweep_points([text])


def _follow(folder: Path, states: dict[str, list[JobState]]) -> int:
    """Follow jobs of which each poll sees the next state, and the last for ever."""
    jobs = []
    for job_id in states:
        job = JobFolder(folder / job_id)
        job.logs.mkdir(parents=True)
        job.write_submitted(job_id)
        jobs.append((f"job{job_id}", job))

    def ask(job_id: str) -> JobState:
        left = states[job_id]
        return left.pop(0) if len(left) > 1 else left[0]

    return follow_all(jobs, ask=ask, sleep=lambda _: None)


def test_the_failure_counts_and_not_the_cancelled_ones_behind_or_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="prefixrl_mcore"):
        result = _follow(
            tmp_path,
            {
                "1": [JobState(state="COMPLETED")],
                "2": [JobState(state="CANCELLED")],
                "3": [JobState(state="RUNNING"), JobState(state="FAILED", exit_code=7)],
            },
        )
    assert result == 7
    summary = capsys.readouterr().out
    assert [summary.count(s) for s in ("COMPLETED", "CANCELLED", "FAILED (7)")] == [1, 1, 1]
    assert "job3: job 3: RUNNING" in caplog.text


def test_cancelled_jobs_alone_are_a_failure_and_a_requeue_is_no_end(tmp_path: Path) -> None:
    assert _follow(tmp_path / "a", {"1": [JobState(state="CANCELLED")]}) == 1
    passing = [JobState(state="FAILED", exit_code=75), JobState(state="PENDING")]
    assert _follow(tmp_path / "b", {"1": [*passing, JobState(state="COMPLETED")]}) == 0


def test_a_job_that_slurm_forgets_does_not_keep_the_others_from_their_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_LOST_SECONDS", 0.0)
    states = {"1": [JobState(state="UNKNOWN")], "2": [JobState(state="COMPLETED")]}
    assert _follow(tmp_path, states) == 69
    assert JobFolder(tmp_path / "1").final_state is None
    assert JobFolder(tmp_path / "2").final_state == JobState(state="COMPLETED")
    summary = capsys.readouterr().out
    assert [summary.count(state) for state in ("UNKNOWN", "COMPLETED")] == [1, 1]


def test_jobs_before_one_that_is_refused_leave_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[JobFolder] = []

    def prepare(*_: object, stage: str, **__: object) -> JobFolder:
        if stage == "eval":
            raise ConfigError("no")
        made.append(JobFolder.make(tmp_path, stage))
        return made[-1]

    site = SiteConfig(gpus_per_node=0, ranks_per_node=1)
    config = SimpleNamespace(run_folder=tmp_path / "run")
    monkeypatch.setattr(recipe, "read_run", lambda *_: (site, config))
    monkeypatch.setattr(recipe, "prepare_run", prepare)
    with pytest.raises(ConfigError, match="no"):
        recipe.launch_recipe(tmp_path / "config.toml", [], "site", LaunchOptions())
    assert len(made) == 3
    assert list(tmp_path.iterdir()) == []
