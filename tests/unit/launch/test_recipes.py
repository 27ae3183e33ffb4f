"""Files under ``configs``: they load, fit their GPUs by prediction, and say what their docs say."""

import io
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prefixrl_mcore.accounting.layouts import make_plan
from prefixrl_mcore.accounting.server_memory import estimate_server
from prefixrl_mcore.accounting.step_time import Assumptions
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.load import load_config
from prefixrl_mcore.config.model_shape import read_model_shape
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.config.site import SiteConfig
from prefixrl_mcore.launch.check import check_layout, print_check, step_work
from prefixrl_mcore.launch.slurm.layout import lay_out
from tests.support.recipe_layouts import (
    GPUS_PER_NODE,
    RECIPES,
    ROOT,
    Recipe,
    changed,
    load_recipe,
    recipe_file,
)
from tests.support.recipe_table import (
    HOST_GIB,
    MARGIN_GIB,
    MEAN_TOKENS,
    USABLE_GIB,
    assumed_machine,
    objections,
    predict,
    tables,
    written_tables,
)
from tests.support.released_configs import RELEASED, write_shape

CONFIGS = ROOT / "configs"
RUNS = sorted(set(CONFIGS.rglob("*.toml")) - {CONFIGS / "demo" / "task.toml"})
EXPERIMENTS = sorted((CONFIGS / "experiments").glob("*.toml"))

PAPER: dict[str, Any] = {
    "batch.prompts_per_step": 128,
    "batch.group_size": 8,
    "collect.max_tries": 2500,
    "prefixes.num_per_trace": 3,
    "prefixes.min_fraction": 0.4,
    "prefixes.max_fraction": 0.8,
    "rollout.temperature": 1.0,
    "rollout.max_completion_tokens": 16384,
    "rollout.max_total_tokens": 36000,
    "rollout.schedule.max_staleness": 0,
    "loss.baseline": "mean",
    "loss.importance": "none",
    "loss.kl": "none",
    "policy.optimizer.lr": 1e-6,
    "policy.optimizer.clip_grad": 1.0,
    "trainer.num_steps": 400,
    "evaluation.temperature": 0.7,
    "evaluation.num_samples": 256,
    "evaluation.pass_at": (1, 8, 16, 32, 64),
    "method": "prefixrl",
}
"""What the paper reports."""

per_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_config_loads(path: Path) -> None:
    assert load_config(RunConfig, path, []).run_folder.parts[0] == "runs"


def test_every_recipe_is_in_the_table() -> None:
    files = set((CONFIGS / "recipes").glob("*.toml"))
    assert files == {recipe_file(recipe) for recipe in RECIPES}


@per_recipe
def test_a_recipe_has_the_settings_of_the_paper(recipe: Recipe) -> None:
    config = load_recipe(recipe)
    for dotted, value in PAPER.items():
        found: Any = config
        for name in dotted.split("."):
            found = getattr(found, name)
        assert found == value, dotted


@per_recipe
def test_recipes_differ_in_model_layout_and_servers_only(recipe: Recipe) -> None:
    own, first = (
        tomllib.loads(recipe_file(one).read_text(encoding="utf-8")) for one in (recipe, RECIPES[0])
    )
    for content in (own, first):
        del content["run_folder"], content["model"], content["rollout"]["sglang"]
        del content["policy"]["parallel"]
        content["policy"].pop("recompute", None)
        content["rollout"].pop("colocated", None)
    assert own == first


@per_recipe
def test_a_recipe_fits_with_a_margin_and_holds_the_longest_sequence(recipe: Recipe) -> None:
    found = predict(recipe)
    assert found.gpu_gib <= MARGIN_GIB
    assert found.server.awake <= 80 * 1024**3
    assert found.host_gib <= HOST_GIB
    assert found.num_longest >= found.num_servers


@per_recipe
def test_every_layout_beside_a_recipe_has_something_against_it(recipe: Recipe) -> None:
    chosen = predict(recipe)
    assert objections(chosen, chosen) == []
    without = [name for name in recipe.neighbours if not objections(predict(recipe, name), chosen)]
    assert without == []


@per_recipe
def test_the_commands_in_a_recipe_are_those_of_its_prediction(recipe: Recipe) -> None:
    text = recipe_file(recipe).read_text(encoding="utf-8")
    name = f"configs/recipes/{recipe.name}.toml"
    check = f"{name} --mean-tokens {MEAN_TOKENS}"
    assert re.search(rf"^#   prefixrl check +{re.escape(check)}$", text, re.M)
    assert re.search(rf"^#   prefixrl launch +{re.escape(name)} --site my-site.toml$", text, re.M)
    nodes = predict(recipe).num_nodes
    expected = f"{nodes} node{'s' if nodes > 1 else ''}, trainer and servers together"
    assert expected in re.sub(r"\s*\n# ?", " ", text)


@per_recipe
def test_launch_lays_a_recipe_out_on_whole_nodes(recipe: Recipe) -> None:
    config, site = load_recipe(recipe), SiteConfig(gpus_per_node=GPUS_PER_NODE)
    layout, found = lay_out(config, site), predict(recipe)
    assert config.rollout.colocated
    assert (layout.trainer_nodes, layout.rollout_nodes) == (found.trainer_nodes, 0)
    if layout.num_nodes == 1:  # rank 0 starts them
        assert config.rollout.sglang.num_servers == found.num_servers
        assert layout.server_nodes == 0
    else:
        assert config.rollout.sglang.num_servers == 1
        assert layout.server_nodes * layout.servers_per_node == found.num_servers
    assert found.num_servers * found.server_gpus == found.num_nodes * GPUS_PER_NODE


@pytest.mark.parametrize(
    ("name", "neighbour"),
    [
        pytest.param("qwen3_32b", "", id="several nodes"),
        pytest.param("llama3_3_70b", "tp4 pp16 full f40", id="a neighbour of several nodes"),
        pytest.param("qwen3_32b", "server4", id="several servers on each"),
        pytest.param("qwen3_32b", "nodes2 server4 f80 tp2 pp8 full", id="servers apart"),
        pytest.param("qwen3_4b", "tp8 none f55", id="one node"),
    ],
)
def test_check_prints_what_the_table_says(name: str, neighbour: str, tmp_path: Path) -> None:
    recipe = next(one for one in RECIPES if one.name == name)
    found = predict(recipe, neighbour)
    config, rollout_nodes = changed(load_recipe(recipe), neighbour)
    model = config.model.model_copy(update={"path": write_shape(recipe.release, tmp_path)})
    said = io.StringIO()
    print_check(
        config.model_copy(update={"model": model}),
        assumed_machine(config, rollout_nodes),
        Console(file=said, width=1000),
    )
    printed, time, gib = said.getvalue(), found.plan.time, 1024**3
    assert f"rollout {time.rollout:.3g} + update {time.update:.3g} (" in printed
    servers = rf"^  {found.num_servers} server\(s\) on "
    if found.shared:
        servers += rf"GPUs of the trainer: at most {found.shared.peak / gib:.2f} GiB of 72"
    else:
        servers += rf"16 GPUs of their own: .* {found.server.awake / gib:.2f} of 80"
    assert re.search(servers, printed, re.M)
    longest = found.num_longest // found.num_servers
    assert f"{longest} of the longest sequences at a time" in printed


def test_the_docs_have_the_tables_of_these_files() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert written_tables(text) == tables()


@per_recipe
def test_a_recipe_without_a_change_is_itself(recipe: Recipe) -> None:
    config = load_recipe(recipe)
    assert changed(config, "") == (config, 0)


def test_a_layout_that_training_refuses_is_no_neighbour() -> None:
    with pytest.raises(ConfigError, match="8 key-value heads do not divide into 16"):
        predict(RECIPES[0], "tp16 none")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_fits_beside_its_server(path: Path) -> None:
    config = load_config(RunConfig, path, [])
    shape = read_model_shape(RELEASED[config.model.path.name])
    check_layout(config, shape)
    plan = make_plan(
        shape,
        config.policy,
        step_work(config, mean_tokens=None),
        Assumptions(peak_flops=989.4e12),
        logits_dtype=config.model.logits_dtype,
    )
    server = estimate_server(shape, config.rollout.sglang, gpu_memory_bytes=80 * 1024**3)
    assert plan.peak_bytes + server.awake <= USABLE_GIB * 1024**3
    assert server.kv_tokens >= config.rollout.max_total_tokens
