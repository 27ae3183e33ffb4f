"""The words of an srun."""

import sys
from pathlib import Path

import pytest

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.site import ContainerConfig, SiteConfig
from prefixrl_mcore.launch.slurm.layout import ONE_TASK, TRAINER, JobLayout
from prefixrl_mcore.launch.slurm.srun import (
    container_words,
    cpus_of_first,
    cpus_of_server,
    interpreter,
)


def test_tasks_run_under_the_interpreter_of_the_launch_unless_the_site_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/nemo_run_env/bin/python")
    own = SiteConfig(gpus_per_node=8, python=Path("/env/bin/python"))
    assert interpreter(own) == "/env/bin/python"
    with pytest.raises(ConfigError, match=r"/opt/nemo_run_env/bin/python.*NeMo-Run replaces"):
        interpreter(SiteConfig(gpus_per_node=8))
    in_container = SiteConfig(gpus_per_node=8, container=ContainerConfig(image="a"))
    assert interpreter(in_container) == "/opt/nemo_run_env/bin/python"  # nothing is replaced there


def test_an_image_without_mounts_and_names_is_all_that_is_said() -> None:
    assert container_words(None) == []
    assert container_words(ContainerConfig(image="a#b")) == ["--container-image=a#b"]


def _layout(shape: str, gpus: int, servers: int) -> JobLayout:
    return JobLayout(
        shape=shape,  # pyright: ignore[reportArgumentType]
        trainer_nodes=1,
        ranks_per_node=8,
        rollout_nodes=1,
        servers_per_node=servers,
        rollout_gpus_per_node=gpus,
    )


def test_cpus_go_with_gpus() -> None:
    site = SiteConfig(gpus_per_node=8, cpus_per_task=12)
    assert cpus_of_first(site, TRAINER) == 12
    assert cpus_of_first(site, "eval") == 96  # one task, with servers on all GPUs of its node
    assert ONE_TASK.ranks_per_node == 1
    assert cpus_of_server(site, _layout("split", gpus=8, servers=2)) == 48
    assert cpus_of_server(site, _layout("heterogeneous", gpus=0, servers=1)) == 12
    own = SiteConfig.model_validate(
        {"gpus_per_node": 8, "cpus_per_task": 12, "rollout_nodes": {"cpus_per_task": 5}}
    )
    assert cpus_of_server(own, _layout("heterogeneous", gpus=8, servers=2)) == 5
    assert cpus_of_server(own, _layout("split", gpus=8, servers=8)) == 12
    none = SiteConfig(gpus_per_node=8)
    assert (cpus_of_first(none, "eval"), cpus_of_server(none, _layout("split", 8, 8))) == (
        None,
        None,
    )
