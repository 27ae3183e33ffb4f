"""The commands in the recipes, run as they stand there.

``check`` says that all fits, and ``launch`` writes a batch script of the right number of nodes for
each of the sites that are to be copied.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.cli import main
from tests.support.recipe_layouts import (
    GPUS_PER_NODE,
    RECIPES,
    ROOT,
    Recipe,
    recipe_file,
)
from tests.support.recipe_table import predict
from tests.support.released_configs import write_shape

LAUNCH_PYTHON = ROOT / ".venv-launch" / "bin" / "python"

pytestmark = pytest.mark.slurm
per_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


def _command(recipe: Recipe, name: str) -> list[str]:
    """Return the words of a command in a recipe's comments, without the program."""
    found = re.search(rf"^# +prefixrl ({name} .*)$", recipe_file(recipe).read_text(), re.M)
    assert found is not None
    return shlex.split(found[1])


@per_recipe
def test_check_says_that_a_recipe_fits(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = write_shape(recipe.release, tmp_path)
    monkeypatch.chdir(ROOT)
    assert main([*_command(recipe, "check"), "--model.path", str(model)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "does not fit" not in printed
    found = predict(recipe)
    servers = rf"{found.num_servers} server\(s\) on GPUs of the trainer: at most"
    assert re.search(rf"fits: .* for the trainer alone .* {servers} .*, fits", printed)
    time = found.plan.time
    assert f"rollout {time.rollout:.3g} + update {time.update:.3g} (" in printed


def _my_site(name: str, folder: Path) -> Path:
    """Return a copy of a shipped profile, with the lines changed that are marked "yours"."""
    yours: dict[str, Any] = {
        "job_folder": folder / "jobs",
        "python": "/usr/bin/python3",
        "launch_python": LAUNCH_PYTHON,
    }
    text = (ROOT / "slurm" / "sites" / f"{name}.toml").read_text(encoding="utf-8")
    for key, value in yours.items():
        text, count = re.subn(rf'^{key} = "[^"]*"', f'{key} = "{value}"', text, flags=re.M)
        assert count == 1, key
    mounts = ", ".join(f'"{path}:{path}"' for path in (ROOT, folder))
    text = re.sub(r"^mounts = .*$", f"mounts = [{mounts}]", text, flags=re.M)
    site = folder / "my-site.toml"
    site.write_text(text, encoding="utf-8")
    return site


@pytest.mark.slow
@pytest.mark.skipif(not LAUNCH_PYTHON.exists(), reason="NeMo-Run: run make setup-launch")
@pytest.mark.parametrize("site", ["bare-metal", "pyxis"])
@per_recipe
def test_launch_writes_a_script_of_the_recipes_nodes(
    recipe: Recipe,
    site: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = write_shape(recipe.release, tmp_path)
    monkeypatch.chdir(ROOT)
    command = [
        str(_my_site(site, tmp_path)) if word == "my-site.toml" else word
        for word in _command(recipe, "launch")
    ]
    assert main([*command, "--dry-run", f"model.path={model}"]) == 0
    script = capsys.readouterr().out
    found = predict(recipe)
    assert re.search(rf"^#SBATCH --nodes={found.num_nodes}$", script, re.M)
    assert f"#SBATCH --ntasks-per-node={GPUS_PER_NODE}" in script
    steps = [line for line in script.splitlines() if line.startswith(("srun ", "srun_rollout "))]
    if found.num_nodes == 1:  # rank 0 starts the servers
        assert len(steps) == 1
        return
    _, servers = steps
    per_node = GPUS_PER_NODE // found.server_gpus
    assert " --overlap " in servers
    assert (
        f"--nodes={found.num_nodes} --ntasks={found.num_nodes * per_node} "
        f"--ntasks-per-node={per_node} --relative=0"
    ) in servers
