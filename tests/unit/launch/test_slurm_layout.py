"""The arithmetic of nodes: what a config needs of a site, and what does not fit."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from prefixrl_mcore.config.base import ConfigError, validate
from prefixrl_mcore.config.load import read_config_file, with_settings
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.config.site import SiteConfig
from prefixrl_mcore.launch.slurm.layout import Shape, explain, lay_out

DEMO = read_config_file(Path(__file__).parents[3] / "configs" / "demo" / "run.toml")
SITE = SiteConfig(gpus_per_node=8)


def _config(*settings: str, **parallel: int) -> RunConfig:
    sizes = [f"policy.parallel.{name}={size}" for name, size in parallel.items()]
    settings = ("rollout.colocated=true", *settings)
    return validate(RunConfig, with_settings(DEMO, [*sizes, *settings]), where="test")


def test_ranks_fill_whole_nodes() -> None:
    config = _config(
        "rollout.engine=transformers",
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=2,
        data_parallel_size=3,
    )
    layout = lay_out(config, SITE)
    assert (layout.trainer_nodes, layout.ranks_per_node, layout.num_nodes) == (3, 8, 3)
    assert (layout.server_nodes, layout.shares_nodes) == (0, False)
    assert explain(config, SITE, layout) == (
        "TP 4 x PP 2 x CP 1 x DP 3 = 24 trainer ranks on 3 x 8 GPUs = 3 nodes"
    )


def test_few_ranks_take_a_part_of_one_node() -> None:
    layout = lay_out(_config(tensor_model_parallel_size=2), SITE)
    assert (layout.trainer_nodes, layout.ranks_per_node) == (1, 2)


def test_ranks_that_leave_gpus_over_are_refused_with_the_arithmetic() -> None:
    config = _config(tensor_model_parallel_size=4, data_parallel_size=5)
    with pytest.raises(ConfigError) as refused:
        lay_out(config, SITE)
    assert str(refused.value) == (
        "TP 4 x PP 1 x CP 1 x DP 5 = 20 trainer ranks do not fill whole nodes of 8 GPUs: 2 nodes "
        "have 16, 3 have 24. Change policy.parallel, for example "
        "policy.parallel.data_parallel_size=4, or set ranks_per_node of the site to a divisor of 20"
    )


def test_rollout_nodes_are_filled_with_servers() -> None:
    config = _config(data_parallel_size=16)
    layout = lay_out(config, SITE, shape="split", rollout_nodes=2)
    assert (layout.trainer_nodes, layout.rollout_nodes, layout.servers_per_node) == (2, 2, 8)
    assert explain(config, SITE, layout) == (
        "TP 1 x PP 1 x CP 1 x DP 16 = 16 trainer ranks on 2 x 8 GPUs + 16 rollout servers x TP 1 "
        "on 2 nodes x 8 GPUs = 4 nodes"
    )


def test_rollout_nodes_of_a_heterogeneous_job_have_gpus_of_their_own_number() -> None:
    site = SiteConfig.model_validate(
        {"gpus_per_node": 8, "rollout_nodes": {"gpus_per_node": 4, "partition": "inference"}}
    )
    layout = lay_out(_config(data_parallel_size=8), site, shape="heterogeneous")
    assert (layout.rollout_nodes, layout.rollout_gpus_per_node, layout.servers_per_node) == (
        1,
        4,
        4,
    )


def test_another_number_of_nodes_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(
        ConfigError, match=r"--nodes 4 does not fit: TP 1 .* = 2 nodes; say --nodes 2"
    ):
        lay_out(_config(data_parallel_size=16), SITE, nodes=4)


def test_servers_that_leave_gpus_over_are_refused() -> None:
    values = with_settings(DEMO, ["rollout.sglang.tensor_parallel_size=3"])
    config = validate(RunConfig, values, where="test")
    with pytest.raises(ConfigError, match="= 3 does not divide the 8 GPUs of a node"):
        lay_out(config, SITE, shape="split")


def test_rollout_nodes_need_a_shape_that_has_them() -> None:
    with pytest.raises(ConfigError, match="--rollout-nodes 1 needs --shape split"):
        lay_out(_config(), SITE, rollout_nodes=1)


@pytest.mark.parametrize("number", [0, -1])
def test_no_rollout_nodes_are_refused(number: int) -> None:
    with pytest.raises(ConfigError, match=f"--rollout-nodes {number}: must be 1 or more"):
        lay_out(_config(), SITE, shape="split", rollout_nodes=number)


def test_more_servers_than_the_first_node_has_gpus_are_refused_with_the_arithmetic() -> None:
    settings = ["rollout.sglang.num_servers=3", "rollout.sglang.tensor_parallel_size=4"]
    config = validate(RunConfig, with_settings(DEMO, settings), where="test")
    with pytest.raises(ConfigError, match=r"1 trainer ranks \+ 3 .* TP 4 = 13 GPUs, but .* has 8"):
        lay_out(config, SITE)
    on_cpus = SiteConfig(gpus_per_node=0, ranks_per_node=1)
    assert lay_out(config, on_cpus).num_nodes == 1
    settings = ["rollout.sglang.num_servers=2", settings[1], "rollout.colocated=true"]
    config = validate(RunConfig, with_settings(DEMO, settings), where="test")
    assert lay_out(config, SITE).num_nodes == 1


def test_every_node_that_trains_is_filled_with_servers() -> None:
    two = "rollout.sglang.tensor_parallel_size=2"
    config = _config(two, tensor_model_parallel_size=8, data_parallel_size=3)
    layout = lay_out(config, SITE)
    assert (layout.num_nodes, layout.rollout_nodes, layout.shares_nodes) == (3, 0, True)
    assert (layout.server_nodes, layout.servers_per_node, layout.rollout_gpus_per_node) == (3, 4, 8)
    assert explain(config, SITE, layout) == (
        "TP 8 x PP 1 x CP 1 x DP 3 = 24 trainer ranks on 3 x 8 GPUs, in turn with 12 rollout "
        "servers x TP 2 = 3 nodes"
    )


def test_gpus_that_no_server_of_rank_0_reaches_are_refused() -> None:
    site = SiteConfig(gpus_per_node=8, ranks_per_node=4)
    awake = _config("rollout.colocated=false", data_parallel_size=8)
    with pytest.raises(ConfigError, match=r"4 of 8 GPUs on 2 trainer nodes: .* and 4 GPUs of each"):
        lay_out(awake, site)
    assert lay_out(awake, site, shape="split").num_nodes == 3
    assert lay_out(_config(data_parallel_size=8), site).servers_per_node == 8
    one = _config("rollout.colocated=false", "rollout.sglang.num_servers=4", data_parallel_size=4)
    assert lay_out(one, site).num_nodes == 1


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_on_one_node_rank_0_starts_the_servers(num_nodes: int) -> None:
    site = SiteConfig(gpus_per_node=0, ranks_per_node=2)
    config = _config("rollout.sglang.num_servers=3", data_parallel_size=2 * num_nodes)
    layout = lay_out(config, site)
    expected = {1: (0, 0, False), 2: (2, 3, True)}  # on CPUs the config has the number
    found = (layout.server_nodes, layout.servers_per_node, layout.shares_nodes)
    assert found == expected[num_nodes]


@pytest.mark.parametrize(("shape", "num_servers"), [("colocated", 16), ("split", 24)])
def test_min_servers_counts_those_of_all_nodes(shape: Shape, num_servers: int) -> None:
    rollout_nodes = None if shape == "colocated" else 3
    for number in (num_servers, num_servers + 1):
        config = _config(f"rollout.sglang.min_servers={number}", data_parallel_size=16)
        refused = pytest.raises(ConfigError, match=f"got {number} > {num_servers}; lower it")
        with refused if number > num_servers else nullcontext():
            lay_out(config, SITE, shape=shape, rollout_nodes=rollout_nodes)


def test_servers_that_run_elsewhere_take_no_task() -> None:
    config = _config('rollout.sglang.urls=["http://a:1"]', data_parallel_size=16)
    assert lay_out(config, SITE).server_nodes == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(
            ["rollout.colocated=false"],
            r"8 trainer ranks \+ 1 servers x TP 1 = 9 GPUs, .* has 8; set rollout.colocated = true",
            id="awake",
        ),
        pytest.param(
            ["rollout.sglang.tensor_parallel_size=3"],
            "does not divide the 8 GPUs of a node",
            id="left over",
        ),
        pytest.param(
            ["rollout.sglang.num_servers=2"],
            r"num_servers = 2: .* 8 GPUs / TP 1 = 8; leave num_servers out",
            id="another number",
        ),
    ],
)
def test_servers_beside_ranks_of_several_nodes_that_do_not_fit_are_refused(
    settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        lay_out(_config(*settings, data_parallel_size=16), SITE)
