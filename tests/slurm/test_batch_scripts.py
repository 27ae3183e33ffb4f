"""The batch scripts that NeMo-Run makes of our template: one golden file per shape.

Made again by ``PREFIXRL_WRITE_GOLDEN=1 pytest tests/slurm/test_batch_scripts.py``, then looked at.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from prefixrl_mcore.config.base import validate
from prefixrl_mcore.config.load import read_config_file, with_settings
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.config.site import SiteConfig
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, TaskFile
from prefixrl_mcore.launch.slurm.layout import Shape, lay_out
from prefixrl_mcore.launch.slurm.sites import load_site
from prefixrl_mcore.launch.slurm.submission import describe, submit

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "fixtures" / "batch_scripts"
LAUNCH_PYTHON = ROOT / ".venv-launch" / "bin" / "python"

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not LAUNCH_PYTHON.exists(), reason="NeMo-Run: run make setup-launch"),
]


def _script(folder: Path, site: SiteConfig, shape: Shape, *settings: str) -> str:
    """Return a batch script, with what is another one each time replaced."""
    values = read_config_file(ROOT / "configs" / "demo" / "run.toml")
    config = validate(RunConfig, with_settings(values, settings), where="test")
    site = site.model_copy(
        update={"launch_python": LAUNCH_PYTHON, "python": site.python or Path("/env/bin/python")}
    )
    layout = lay_out(config, site, shape=shape)
    job = JobFolder.make(folder, "golden")
    task = TaskFile(
        config="c",
        run_folder="r",
        working_directory="/",
        is_resumed=False,
        num_servers=0,
        gpus_per_server=0,
    )
    job.write(task, describe("golden", site, layout, job, dry_run=True))
    submit(site, [job])
    assert job.job_id is None
    script = job.script.read_text().replace(str(job.path), "/jobs/golden-1")
    return re.sub(r"golden_\d{10,}", "golden_1", script) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "site", "shape", "settings"),
    [
        (
            "colocated",
            "bare-metal",
            "colocated",
            [
                "policy.parallel.tensor_model_parallel_size=8",
                "policy.parallel.data_parallel_size=2",
            ],
        ),
        ("split", "bare-metal", "split", ["policy.parallel.data_parallel_size=16"]),
        ("heterogeneous", "pyxis", "heterogeneous", ["policy.parallel.data_parallel_size=8"]),
        ("ci-local", "ci-local", "colocated", ["policy.parallel.tensor_model_parallel_size=2"]),
    ],
)
def test_a_batch_script_is_the_golden_one(
    tmp_path: Path, name: str, site: str, shape: Shape, settings: list[str]
) -> None:
    script = _script(tmp_path, load_site(site), shape, *settings)
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


@pytest.mark.slow
def test_awkward_values_arrive_as_they_are(tmp_path: Path) -> None:
    site = SiteConfig.model_validate(
        {
            "gpus_per_node": 0,
            "ranks_per_node": 1,
            "python": "/my env/bin/python",
            "srun_args": ["--comment=a 'b' \"c\" $d"],
            "container": {"image": "a b.sqsh", "mounts": ["/x y:/z"]},
            "sbatch": {"mail-user": "me@example.org; rm", "comment": "two words"},
        }
    )
    script = _script(tmp_path, site, "colocated")
    assert "#SBATCH --comment='two words'" in script
    assert "#SBATCH --mail-user='me@example.org; rm'" in script
    assert "--container-image 'a b.sqsh' --container-mounts '/x y:/z'," in script
    command = next(line for line in script.splitlines() if line.startswith("srun "))
    echoed = subprocess.run(
        ["bash", "-c", "start=0; srun() { printf '%s\\n' \"$@\"; }\n" + command],
        text=True,
        capture_output=True,
        check=True,
    )
    words = echoed.stdout.splitlines()
    assert "--comment=a 'b' \"c\" $d" in words
    assert words[-4:] == ["-m", "prefixrl_mcore.launch.slurm.task", "/jobs/golden-1", "trainer"]
    assert "/my env/bin/python" in words
