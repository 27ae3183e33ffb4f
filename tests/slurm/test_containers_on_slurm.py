"""Jobs in containers, on real Slurm, through the stand-in for Pyxis of ``slurm/testing/pyxis``."""

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prefixrl_mcore.cli import main
from prefixrl_mcore.launch.slurm.job_folder import find_job
from prefixrl_mcore.launch.slurm.states import job_state
from tests.slurm.conftest import LAUNCH_PYTHON
from tests.support.launched_jobs import tiny_settings
from tests.support.secrets import ProcessWatch
from tests.support.tiny_run import CONFIG, ROOT, TinyTask, metrics_of

pytestmark = pytest.mark.slurm

needs_launcher = pytest.mark.skipif(
    not LAUNCH_PYTHON.exists(), reason="NeMo-Run: run make setup-launch"
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return an image with the system and this Python; the checkout is not in it."""
    system = [f"/{name}" for name in ("usr", "bin", "lib", "lib64", "sbin", "etc", "opt")]
    python = {sys.prefix, sys.base_prefix, str(Path(sys.base_prefix).resolve())}
    held = [*system, str(Path(sys.prefix).resolve()), *sorted(python - {str(ROOT / ".venv")})]
    lines = [path for path in held if os.path.lexists(path)]
    file = tmp_path / "image.sqsh"
    file.write_text("\n".join(["# test", *lines, "OF_IMAGE=image", "OF_BOTH=image"]) + "\n")
    return file


def _srun(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["srun", *arguments], capture_output=True, text=True, check=False, cwd="/tmp", timeout=180
    )


def test_a_task_sees_its_image_and_its_mounts_alone(
    slurm: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_BOTH", "job")
    monkeypatch.setenv("OF_JOB", "job")
    data = tmp_path / "data"
    data.mkdir()
    (data / "file").write_text("mounted")
    program = (
        f"cat file; pwd; ls -d {tmp_path}/*; echo $OF_IMAGE $OF_BOTH $OF_JOB; echo yes >written; "
        f"touch /usr/made /made {data}/made; hostname"
    )
    mounts = f"--container-mounts={data}:/there,{data}:{data}:rprivate+ro"
    where = [f"--container-image={image}", mounts, "--container-workdir=/there"]
    done = _srun(*where, "--no-container-mount-home", "bash", "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mounted/there", str(data), "image", "image", "job", "n1"]
    assert (data / "written").read_text() == "yes\n"
    assert done.stderr.count("Read-only file system") == 3
    assert not Path("/there").exists()
    last = (slurm / "log" / "containers.log").read_text().splitlines()[-1]
    assert f"task 0 on n1 in {image}, mount namespace" in last
    own = os.stat("/proc/self/ns/mnt").st_ino
    assert int(last.rpartition(" ")[2]) != own


def test_named_variables_of_the_job_win_over_the_images(
    slurm: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_BOTH", "job")
    names = "--container-env=OF_IMAGE,OF_BOTH"
    done = _srun(f"--container-image={image}", names, "bash", "-c", "echo $OF_IMAGE $OF_BOTH")
    assert done.stdout.split() == ["image", "job"], done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--container-image=nvcr.io#none"], "[ERROR] No such file or directory: nvcr.io#none"),
        (["--container-mounts=/no/where:/x"], "failed to mount: /no/where: No such file"),
        (["--container-workdir=/no/where"], "the working directory: /no/where: No such file"),
    ],
)
def test_what_does_not_exist_ends_the_task(
    slurm: Path, image: Path, options: list[str], said: str
) -> None:
    done = _srun(f"--container-image={image}", *options, "true")
    assert done.returncode == 1
    assert said in done.stderr
    assert "pyxis: couldn't start container" in done.stderr


@pytest.fixture
def site(jobs: Path, image: Path, tiny_task: TinyTask, tmp_path: Path) -> Path:
    """Let ``--site ci-container`` be that of Pyxis on the local cluster; return its file."""
    runs = tmp_path / "runs"
    runs.mkdir()
    jobs.mkdir()
    mounts = ", ".join(f'"{path}:{path}"' for path in (ROOT, jobs, runs, tiny_task.folder))
    container = f'\n[container]\nimage = "{image}"\nmounts = [{mounts}]\n'
    srun = 'srun_args = ["--no-container-mount-home", "--container-writable"]\n'
    file = tmp_path / "ci-container.toml"
    file.write_text(srun + (tmp_path / "ci-local.toml").read_text() + container)
    return file


def _launch(tiny: TinyTask, run: Path, *settings: str) -> int:
    return main(
        [
            *("launch", str(CONFIG), "--site", "ci-container", *tiny_settings(tiny, run)),
            *("trainer.num_steps=2", "checkpoint.every_steps=2", "evaluation.every_steps=2"),
            *settings,
        ]
    )


@needs_launcher
@pytest.mark.slow
def test_a_run_trains_and_saves_in_containers_and_tells_no_secret(
    slurm: Path,
    jobs: Path,
    site: Path,
    tiny_task: TinyTask,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inherited, sourced = "1" * 20 + "f-th3-us3r-1nh3r1t3d", "f-th3-us3r-s0urc3d"
    monkeypatch.setenv("WANDB_API_KEY", inherited)
    own = tmp_path_factory.mktemp("home") / "secrets"
    own.write_text(f"export HF_TOKEN={sourced}\n")
    own.chmod(0o600)
    text = site.read_text().replace("setup_lines = [", f'setup_lines = [\n    "source {own}",')
    site.write_text(text + 'environment = ["WANDB_API_KEY", "HF_TOKEN"]\n')
    run = tmp_path / "runs" / "contained"
    with ProcessWatch([inherited, sourced], holder="launch.slurm.task") as watch:
        assert _launch(tiny_task, run, "metrics.wandb.mode=offline") == 0
    assert watch.has_reached
    assert watch.num_looks > 10
    assert watch.leaks == set()
    of_slurm = [file for file in (slurm / "log").rglob("*") if file.is_file()]
    assert {"slurmctld.log", "containers.log"} <= {file.name for file in of_slurm}
    files = [*of_slurm, *(file for file in tmp_path.rglob("*") if file.is_file())]
    assert len(files) > 40
    told = [f for f in files for s in (inherited, sourced) if s.encode() in f.read_bytes()]
    assert told == []
    job = find_job(jobs, "contained")
    assert [line["step"] for line in metrics_of(run, "train")] == [0, 1]
    assert list((run / "checkpoints").iterdir())
    entered = [
        line.split(" in ")[0]
        for line in (slurm / "log" / "containers.log").read_text().splitlines()
        if line.startswith(f"{job.job_id}.")
    ]
    # The pre-check, then both ranks.
    assert sorted(entered) == [
        f"{job.job_id}.0 task 0 on n1",
        f"{job.job_id}.1 task 0 on n1",
        f"{job.job_id}.1 task 1 on n1",
    ]


@needs_launcher
@pytest.mark.slow
def test_a_model_of_links_whose_files_are_not_mounted_is_named_before_training(
    jobs: Path, site: Path, tiny_task: TinyTask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # As in Hugging Face's cache; on this machine the links lead somewhere.
    blobs, snapshot = tmp_path / "blobs", tmp_path / "runs" / "snapshot"
    shutil.copytree(tiny_task.folder / "base", blobs)
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    run = tmp_path / "runs" / "linked"
    with caplog.at_level(logging.INFO, logger="prefixrl_mcore"):
        assert _launch(tiny_task, run, f"model.path={snapshot}") == 78
    (said,) = re.findall("^bad node n1: (.*)$", caplog.text, flags=re.MULTILINE)
    assert said.startswith(f"model.path {snapshot} has a link to {blobs}/")
    remedy = f'which is not there; container.mounts of the site lacks "{blobs}:{blobs}"'
    assert said.endswith(remedy)
    assert "precheck on n1 was the first to report, exit code 78" in caplog.text
    job = find_job(jobs, "linked")
    assert job_state(job.job_id or "").num_restarts == 0  # no other node would do better
    assert not run.exists()


@needs_launcher
@pytest.mark.slow
def test_an_image_that_nobody_has_ends_the_job_with_its_name(
    jobs: Path, site: Path, tiny_task: TinyTask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site.write_text(site.read_text().replace("image.sqsh", "missing.sqsh"))
    assert _launch(tiny_task, tmp_path / "runs" / "imageless") == 1
    assert f"pyxis:     [ERROR] No such file or directory: {tmp_path}/missing.sqsh" in caplog.text
