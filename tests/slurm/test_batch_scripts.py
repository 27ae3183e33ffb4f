"""The batch scripts that NeMo-Run makes of our template: one golden file per shape.

Made again by ``PREFIXRL_WRITE_GOLDEN=1 pytest tests/slurm/test_batch_scripts.py``, then looked at.
"""

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.config.base import validate
from prefixrl_mcore.config.load import read_config_file, with_settings
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.config.site import SiteConfig
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, TaskFile
from prefixrl_mcore.launch.slurm.layout import ONE_TASK, TRAINER, Shape, lay_out
from prefixrl_mcore.launch.slurm.sites import load_site
from prefixrl_mcore.launch.slurm.submission import describe, submit

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "fixtures" / "batch_scripts"
LAUNCH_PYTHON = ROOT / ".venv-launch" / "bin" / "python"

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(not LAUNCH_PYTHON.exists(), reason="NeMo-Run: run make setup-launch"),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One job whose batch script is looked at."""

    site: str = "ci-local"
    shape: Shape = "colocated"
    settings: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)
    """Keys of the site on top of its profile."""

    stage: str = TRAINER
    after: str | None = None
    """Another case, whose job this one waits for."""


EIGHT = "policy.parallel.data_parallel_size=8"
GOLDEN_CASES = {
    "colocated": Case(
        site="bare-metal", settings=("rollout.colocated=true",
                                     "policy.parallel.tensor_model_parallel_size=8"),
    ),
    "colocated-two-nodes": Case(
        site="bare-metal",
        settings=("policy.parallel.tensor_model_parallel_size=8",
                  "policy.parallel.data_parallel_size=2",
                  "rollout.colocated=true", "rollout.sglang.tensor_parallel_size=2"),
    ),
    "split": Case(
        site="bare-metal", shape="split", settings=("policy.parallel.data_parallel_size=16",)
    ),
    "heterogeneous": Case(site="pyxis", shape="heterogeneous", settings=(EIGHT,)),
    "ci-local": Case(settings=("policy.parallel.tensor_model_parallel_size=2",)),
    "stage": Case(site="bare-metal", stage="eval", after="colocated"),
    "unchecked": Case(more={"precheck": {"enabled": False}, "requeue": {"max_restarts": 0}}),
}  # fmt: skip
PLAIN = {"gpus_per_node": 8, "ranks_per_node": None}
OTHER_CASES = {
    "trainers-own": Case(
        shape="heterogeneous",
        settings=(EIGHT,),
        more=PLAIN
        | {"constraint": "nvlink", "gpu_type": "h100", "cpus_per_task": 12, "qos": "high"}
        | {"partition": "trainers", "memory": "900G", "rollout_nodes": {"gpus_per_node": 0}},
    ),
    "rollouts-own": Case(
        shape="heterogeneous",
        settings=(EIGHT, "rollout.sglang.tensor_parallel_size=2"),
        more=PLAIN
        | {"partition": None, "memory": None}
        | {
            "rollout_nodes": {
                "partition": "inference",
                "qos": "low",
                "constraint": "l40s",
                "gpus_per_node": 4,
                "gpu_type": "l40s",
                "cpus_per_task": 9,
                "memory": "200G",
            }
        },
    ),
    "awkward": Case(
        more={
            "ranks_per_node": 1,
            "python": "/my env/bin/python",
            "srun_args": ["--comment=a 'b' \"c\" $d"],
            "container": {"image": "a b.sqsh", "mounts": ["/x y:/z"], "environment": ["HF_TOKEN"]},
            "sbatch": {"mail-user": "me@example.org; rm", "comment": "two words"},
        }
    ),
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Make the batch scripts of all cases in one go; return them by name."""
    folder, jobs = tmp_path_factory.mktemp("jobs"), {}
    for name, case in {**GOLDEN_CASES, **OTHER_CASES}.items():
        jobs[name] = _prepare(folder, name, case, jobs)
    site = load_site("ci-local").model_copy(update={"launch_python": LAUNCH_PYTHON})
    submit(site, [*jobs.values()])
    return {name: _without_what_differs(job) for name, job in jobs.items()}


def _prepare(folder: Path, name: str, case: Case, jobs: dict[str, JobFolder]) -> JobFolder:
    values = read_config_file(ROOT / "configs" / "demo" / "run.toml")
    config = validate(RunConfig, with_settings(values, case.settings), where="test")
    known = load_site(case.site).model_dump() | {"python": Path("/env/bin/python")}
    if case.site != "ci-local":
        known["python"] = load_site(case.site).python
    site = SiteConfig.model_validate(known | case.more)
    layout = lay_out(config, site, shape=case.shape) if case.stage == TRAINER else ONE_TASK
    job = JobFolder.make(folder, "golden")
    task = TaskFile(
        config="c",
        run_folder="r",
        working_directory="/",
        is_resumed=False,
        num_servers=0,
        gpus_per_server=0,
    )
    after = jobs[case.after] if case.after else None
    job.write(
        task, describe("golden", site, layout, job, dry_run=True, role=case.stage, after=after)
    )
    return job


def _without_what_differs(job: JobFolder) -> str:
    """Return a batch script, with what is another one each time replaced."""
    assert job.job_id is None
    script = job.script.read_text().replace(str(job.path), "/jobs/golden-1")
    return re.sub(r"golden_\d{10,}", "golden_1", script) + "\n"


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_a_batch_script_is_the_golden_one(scripts: dict[str, str], name: str) -> None:
    script = scripts[name]
    assert "set -x" not in re.sub(r"^#.*", "", script, flags=re.MULTILINE)
    syntax = subprocess.run(
        ["bash", "-n"], input=script, text=True, capture_output=True, check=False
    )
    assert syntax.returncode == 0, syntax.stderr
    golden = GOLDEN / f"{name}.sh"
    if os.environ.get("PREFIXRL_WRITE_GOLDEN") == "1":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(script)
    assert script == golden.read_text()


def _component(script: str, index: int) -> set[str]:
    """Return the options of one component that have to do with what its nodes are."""
    flags = re.findall(r"^#SBATCH --(\S+)", script.split("#SBATCH hetjob\n")[index], re.MULTILINE)
    same = ("job-name", "kill-on", "open-mode", "output", "signal", "time")
    return {flag for flag in flags if not flag.startswith(same)}


def test_rollout_nodes_do_not_get_what_only_the_trainers_must_have(
    scripts: dict[str, str],
) -> None:
    script = scripts["trainers-own"]
    shared = {"partition=trainers", "qos=high", "mem=900G", "cpus-per-task=12", "nodes=1"}
    assert _component(script, 0) == shared | {
        *("constraint=nvlink", "gpus-per-node=h100:8", "ntasks-per-node=8")
    }
    assert _component(script, 1) == shared | {"ntasks-per-node=1"}


def test_rollout_nodes_get_what_only_they_must_have(scripts: dict[str, str]) -> None:
    script = scripts["rollouts-own"]
    assert _component(script, 0) == {"gpus-per-node=8", "nodes=1", "ntasks-per-node=8"}
    assert _component(script, 1) == {
        *("partition=inference", "qos=low", "constraint=l40s", "gpus-per-node=l40s:4"),
        *("cpus-per-task=9", "mem=200G", "nodes=1", "ntasks-per-node=2"),
    }
    commands = [line for line in script.splitlines() if line.startswith(("srun ", "srun_rollout "))]
    assert ["--cpus-per-task=9 " in command for command in commands] == [False, True]
    check = next(line for line in script.splitlines() if line.startswith("timeout "))
    assert ["--cpus-per-task=9 " in part for part in check.split(" : ")] == [False, True]


def _words(line: str) -> list[str]:
    """Return the words of a command of the script as bash understands them."""
    printing = 'start=0; srun() { printf \'%s\\n\' "$@"; }; timeout() { shift 2; "$@"; }\n'
    echoed = subprocess.run(
        ["bash", "-c", printing + line], text=True, capture_output=True, check=True
    )
    return echoed.stdout.splitlines()


def test_awkward_values_arrive_as_they_are(scripts: dict[str, str]) -> None:
    script = scripts["awkward"]
    assert "#SBATCH --comment='two words'" in script
    assert "#SBATCH --mail-user='me@example.org; rm'" in script
    assert "--container-image 'a b.sqsh' --container-mounts '/x y:/z'," in script
    words = _words(next(line for line in script.splitlines() if line.startswith("srun ")))
    assert "--comment=a 'b' \"c\" $d" in words
    assert words[-4:] == ["-m", "prefixrl_mcore.launch.slurm.task", "/jobs/golden-1", "trainer"]
    assert "/my env/bin/python" in words


def test_awkward_values_arrive_at_the_pre_check_as_they_are(scripts: dict[str, str]) -> None:
    lines = scripts["awkward"].splitlines()
    words = _words(next(line for line in lines if line.startswith("timeout --kill-after")))
    assert words[:2] == ["--output", "/jobs/golden-1/logs/start-0/precheck.log"]
    assert words[-10:] == [
        *("--container-image=a b.sqsh", "--container-mounts=/x y:/z", "--container-env=HF_TOKEN"),
        *("--comment=a 'b' \"c\" $d", "/my env/bin/python"),
        *("-m", "prefixrl_mcore.launch.slurm.precheck.task", "/jobs/golden-1", "60", "600"),
    ]


def _output(script: str, **environment: str) -> str:
    """Return what bash prints of the environment that a script has for its tasks."""
    head = script.partition("# What the tasks must know")[0]
    done = subprocess.run(
        ["bash", "-c", f"{head}\nenv"],
        text=True,
        capture_output=True,
        check=True,
        env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", **environment},
    )
    return done.stdout


def test_a_script_without_the_launchers_environment_makes_a_key_of_its_own(
    scripts: dict[str, str], tmp_path: Path
) -> None:
    script = scripts["unchecked"].replace("/jobs/golden-1", str(tmp_path))
    keys = [
        re.findall("^PREFIXRL_SGLANG_API_KEY=([0-9a-f]{64})$", _output(script), re.MULTILINE)
        for _ in range(2)
    ]
    assert [len(found) for found in keys] == [1, 1]
    assert keys[0] != keys[1]
    given = _output(script, PREFIXRL_SGLANG_API_KEY="the-users-own-k3y", SLURM_EXPORT_ENV="NONE")
    assert "PREFIXRL_SGLANG_API_KEY=the-users-own-k3y\n" in given
    assert "SLURM_EXPORT_ENV=ALL\n" in given
