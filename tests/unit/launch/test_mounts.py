"""Mounts of a container against what a config names."""

import re
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.config.base import ConfigError, validate
from prefixrl_mcore.config.load import read_config_file, with_settings
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.config.site import SiteConfig
from prefixrl_mcore.launch.slurm.mounts import (
    check_mounts,
    needed_paths,
    paths_on_nodes,
    warn_of_interpreters,
)

CONFIG = Path(__file__).parents[3] / "configs" / "demo" / "run.toml"


def _site(*mounts: str, **more: Any) -> SiteConfig:
    values = {"gpus_per_node": 8, "container": {"image": "x", "mounts": mounts}, **more}
    return validate(SiteConfig, values, where="test")


def _refusal(site: SiteConfig, **paths: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        check_mounts(site, paths)
    return str(refused.value)


def test_all_paths_of_a_config_are_needed_but_not_what_the_image_may_have() -> None:
    settings = [
        *("run_folder=runs/r", "model.path=/models/m", "data.problems=/data/p.jsonl"),
        *("data.held_out.amc=/data/amc.jsonl", "rollout.sglang.sync.folder=/fast/sync"),
    ]
    values = with_settings(read_config_file(CONFIG), settings)
    config = validate(RunConfig, values, where="test")
    site = _site("/home/me:/home/me", job_folder="/jobs")
    needed = needed_paths(config, _site(job_folder="/jobs"), Path("/home/me"), has_servers=True)
    expected = {
        "the working directory": "/home/me",
        "job_folder": "/jobs",
        "run_folder": "/home/me/runs/r",
        "model.path": "/models/m",
        "data.problems": "/data/p.jsonl",
        "data.held_out.amc": "/data/amc.jsonl",
        "rollout.sglang.sync.folder": "/fast/sync",
    }
    assert {name: str(needed[name]) for name in expected} == expected
    assert "rollout.sglang.python" not in needed
    for ours in (site, SiteConfig(gpus_per_node=8)):
        needed = needed_paths(config, ours, Path("/home/me"), has_servers=True)
        assert needed["rollout.sglang.python"] == Path("/home/me/.venv-sglang/bin/python")
        needed = needed_paths(config, ours, Path("/home/me"), has_servers=False)
        assert "rollout.sglang.python" not in needed


def test_an_interpreter_that_is_a_link_to_what_nodes_may_not_see_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, shared = tmp_path / "home", tmp_path / "shared"
    monkeypatch.setenv("HOME", str(home))
    link, target = shared / ".venv" / "bin" / "python", home / "uv" / "bin" / "python3.12"
    for file in (link, target):
        file.parent.mkdir(parents=True)
    target.touch()
    link.symlink_to(target)

    def warned(site: SiteConfig) -> str:
        caplog.clear()
        warn_of_interpreters(site, {"rollout.sglang.python": Path("/image/python")})
        return caplog.text

    said = f"python of the site {link} is a link to {target}"
    bare = SiteConfig(gpus_per_node=8, python=link)
    assert f"{said}: nodes must have it, so your home folder must be shared" in warned(bare)
    assert "rollout.sglang.python /image/python is not here; nodes must have it" in warned(bare)
    assert said not in warned(SiteConfig(gpus_per_node=8, python=target))
    assert f"{said}, which is not mounted: the image must have it" in warned(
        _site(f"{shared}:{shared}", python=link)
    )
    assert warned(_site(f"{tmp_path}:{tmp_path}", python=link)) == ""
    assert warned(_site("/lustre:/lustre", python=link)) == ""  # the image's own


def test_a_folder_above_is_enough_and_without_a_container_nothing_is_mounted() -> None:
    needed = {"run_folder": Path("/lustre/me/run"), "model.path": Path("/lustre/models/m")}
    check_mounts(_site("/lustre:/lustre"), needed)
    check_mounts(SiteConfig(gpus_per_node=8), needed)


def test_what_is_not_mounted_is_named_with_the_mounts_to_add() -> None:
    said = _refusal(
        _site("/lustre:/lustre"),
        run_folder=Path("/scratch/run"),
        job_folder=Path("/lustre/jobs"),
        **{"data.problems": Path("/data/p.jsonl"), "data.traces": Path("/data/traces")},
    )
    assert "  run_folder /scratch/run: not mounted\n" in said
    assert "job_folder" not in said
    assert said.endswith('any folder above: "/data:/data", "/scratch/run:/scratch/run"')


def test_another_path_and_a_read_only_run_folder_are_refused() -> None:
    site = _site("/lustre/me:/me", "/lustre/me:/lustre/me:ro")
    said = _refusal(site, job_folder=Path("/me/jobs"), run_folder=Path("/lustre/me/run"))
    assert "job_folder /me/jobs: /lustre/me is mounted there; mount folders under their" in said
    assert "run_folder /lustre/me/run: /lustre/me is mounted read-only" in said
    check_mounts(site, {"model.path": Path("/lustre/me/model")})


def test_of_mounts_in_each_other_the_innermost_counts() -> None:
    run = {"run_folder": Path("/lustre/me/run")}
    check_mounts(_site("/lustre:/lustre:ro", "/lustre/me:/lustre/me"), run)
    site = _site("/lustre/me:/lustre/me:rprivate+ro", "/lustre:/lustre")
    assert "run_folder /lustre/me/run: /lustre/me is mounted read-only" in _refusal(site, **run)


def test_a_link_to_what_is_not_mounted_is_refused_but_not_one_that_is_mounted_itself(
    tmp_path: Path,
) -> None:
    target, home = tmp_path / "disk" / "model", tmp_path / "home"
    target.mkdir(parents=True)
    home.mkdir()
    link = home / "model"
    link.symlink_to(target)
    said = _refusal(_site(f"{home}:{home}"), model=link)
    assert f"model {link}: a link to {target}, which is not mounted" in said
    assert f'"{target}:{target}"' in said
    check_mounts(_site(f"{home}:{home}", f"{target}:{target}"), {"model": link})
    check_mounts(_site(f"{link}:{link}"), {"model": link})  # Enroot follows it


def test_a_mount_that_this_machine_lacks_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check_mounts(_site("/no/where:/no/where"), {})
    assert "/no/where is not on this machine; nodes must have it" in caplog.text


@pytest.mark.parametrize("mount", ["/one", "here:/there", "/a:b", "/a:/b:ro:more"])
def test_a_mount_is_two_absolute_paths(mount: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{mount!r} must be host:container")):
        _site(mount)


def test_nodes_must_have_what_is_here_now(tmp_path: Path) -> None:
    needed = {"run_folder": tmp_path / "runs" / "r", "model.path": tmp_path, "x": Path("/no/where")}
    assert paths_on_nodes(needed) == {"run_folder": str(tmp_path), "model.path": str(tmp_path)}
