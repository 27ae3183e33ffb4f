"""Several jobs at once on real Slurm: the stages of a run in their order, and sweeps."""

import contextlib
import json
import logging
import re
import subprocess
from pathlib import Path

import pytest

from prefixrl_mcore.cli import main
from prefixrl_mcore.launch.slurm.job_folder import find_job, find_jobs
from prefixrl_mcore.launch.slurm.launch import LaunchOptions, prepare_run, read_run
from prefixrl_mcore.launch.slurm.states import job_state
from prefixrl_mcore.launch.slurm.submission import submit
from tests.slurm.conftest import LAUNCH_PYTHON
from tests.support.gate import HAS_GATE, Gate
from tests.support.launched_jobs import end_of, wait_for
from tests.support.tiny_run import CONFIG, TinyTask, metrics_of

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # of a loaded machine
    pytest.mark.skipif(not LAUNCH_PYTHON.exists(), reason="NeMo-Run: run make setup-launch"),
]

STAGES = ["collect", "prefixes", "train", "eval", "report"]


def _settings(tiny: TinyTask, run_folder: Path, data: Path) -> list[str]:
    """Return the settings of a run of one rank and one step, with traces of its own."""
    return [
        f"run_folder={run_folder}",
        f"model.path={tiny.folder / 'base'}",
        f"data.problems={tiny.folder / 'train.jsonl'}",
        f"data.held_out.held-out={tiny.folder / 'held_out.jsonl'}",
        *(f"data.traces={data / 'traces'}", f"data.prefixes={data / 'prefixes'}"),
        "rollout.engine=transformers",
        *("batch.prompts_per_step=4", "batch.group_size=4", "batch.stream_tokens=256"),
        *("rollout.max_total_tokens=64", "rollout.max_completion_tokens=32"),
        *("trainer.num_steps=1", "checkpoint.every_steps=1", "evaluation.every_steps=1"),
        *("evaluation.num_samples=2", "evaluation.training_num_samples=2"),
        "evaluation.unlock_num_samples=2",
    ]


def _launch(*arguments: str) -> int:
    return main(["launch", str(CONFIG), "--site", "ci-local", *arguments])


def test_the_stages_of_a_run_follow_each_other_to_a_report(
    jobs: Path, tiny_task: TinyTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, checkpoint = tmp_path / "whole", tmp_path / "checkpoint"
    settings = _settings(tiny_task, run, tmp_path / "data")
    settings.remove(f"model.path={tiny_task.folder / 'base'}")
    assert main(["convert", "from-hf", str(tiny_task.folder / "base"), str(checkpoint)]) == 0
    assert _launch("--recipe", "--init", str(checkpoint), *settings) == 0
    assert (run / "report.html").exists()
    assert list((run / "eval").glob("*.json"))
    assert len(metrics_of(run, "train")) == 1
    summary = capsys.readouterr().out
    assert summary.count("COMPLETED") == 5
    folders = [find_job(jobs, f"whole.{stage}-") for stage in STAGES]
    dependencies = [
        line for folder in folders for line in folder.script.read_text().splitlines()
        if "--dependency=" in line
    ]  # fmt: skip
    assert dependencies == [f"#SBATCH --dependency=afterok:{f.job_id}" for f in folders[:-1]]
    assert main(["jobs", "list", "--jobs", str(jobs)]) == 0
    assert capsys.readouterr().out.count("COMPLETED") == 5


def test_a_stage_that_fails_leaves_none_waiting(
    jobs: Path, tiny_task: TinyTask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = _settings(tiny_task, tmp_path / "failing", tmp_path / "data")
    (tmp_path / "broken.jsonl").write_text("no problem\n")
    broken = f"data.problems={tmp_path / 'broken.jsonl'}"
    with caplog.at_level(logging.INFO, logger="prefixrl_mcore"):
        assert _launch("--recipe", *settings, broken) == 2
    assert "collect-0 on n1 was the first to report, exit code 2" in caplog.text
    assert "broken.jsonl" in caplog.text
    states = [job_state(job.job_id or "").state for job in find_jobs(jobs)]
    assert sorted(states) == ["CANCELLED"] * 4 + ["FAILED"]
    waiting = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True)
    assert waiting.stdout == ""


def test_an_evaluation_that_is_told_to_end_goes_on_after_the_requeue(
    jobs: Path, tiny_task: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, gate = tmp_path / "told", Gate(tmp_path / "gate")
    gate.close(2)
    gate.inherited(monkeypatch)
    checkpoint = run / "checkpoints" / "step-000000"
    assert main(["convert", "from-hf", str(tiny_task.folder / "base"), str(checkpoint)]) == 0
    one_by_one = ["rollout.transformers.max_batch_size=1", "evaluation.keep_seconds=0"]
    own = [*one_by_one, "evaluation.num_samples=8", "evaluation.train_set_num_samples=8"]
    settings = [*_settings(tiny_task, run, tiny_task.folder), *own, HAS_GATE]
    site, config = read_run(CONFIG, settings, "ci-local")
    job = prepare_run(config, site, LaunchOptions(), stage="eval")
    submit(site, [job])
    assert job.job_id is not None
    part = run / "eval" / "step-000000.part.jsonl"

    def has_begun() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return part.read_bytes().count(b"\n") >= 3
        return False

    wait_for(has_begun, seconds=300)
    subprocess.run(["scancel", "--signal=USR1", job.job_id], check=True)
    wait_for((job.start_folder(0) / "eval-0.end.json").exists)
    gate.open()
    result, said = end_of(job)
    assert result == 0, said
    assert f"start 0 of job {job.job_id} ended with exit code 138" in said
    assert job_state(job.job_id).num_restarts == 1
    told = " ".join((job.starts()[1] / "eval-0.log").read_text().split())
    continued = re.search(r"continuing part .*?, (\d+) of 8 problems are done", told)
    assert continued is not None
    assert int(continued[1]) >= 2
    assert json.loads((run / "eval" / "step-000000.json").read_text())["is_complete"]


def test_a_sweep_is_a_run_for_each_value(
    jobs: Path, tiny_task: TinyTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = _settings(tiny_task, tmp_path / "swept", tiny_task.folder)
    assert _launch("--sweep", "policy.optimizer.lr=1e-4,1e-5", *settings) == 0
    assert capsys.readouterr().out.count("COMPLETED") == 2
    for value in ("1e-4", "1e-5"):
        run = tmp_path / f"swept-lr-{value}"
        (line,) = metrics_of(run, "train")
        assert line["step"] == 0
        saved = json.loads((run / "config.json").read_text())
        assert saved["policy"]["optimizer"]["lr"] == float(value)
