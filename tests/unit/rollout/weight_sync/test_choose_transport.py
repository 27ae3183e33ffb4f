"""Which transport is chosen: by device, by where the servers are, by what both sides can do."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixrl_mcore.config.base import ConfigError, validate
from prefixrl_mcore.config.rollout import RolloutConfig, SGLangConfig
from prefixrl_mcore.rollout.weight_sync import choose
from prefixrl_mcore.rollout.weight_sync.choose import choose_transport
from prefixrl_mcore.rollout.weight_sync.releases import (
    nccl_version,
    own_nccl,
    own_torch,
    torch_release,
)
from prefixrl_mcore.rollout.weight_sync.transport import Transport

OURS = Path(sys.executable)
HERE, THERE = "http://127.0.0.1:30000", "http://elsewhere.invalid:30000"


def chosen(
    transport: str | None, device: str, *urls: str, colocated: bool = False, python: Path = OURS
) -> Transport:
    config = SGLangConfig.model_validate(
        {"python": python, "urls": urls, "sync": {"transport": transport}}
    )
    return choose_transport(
        config, device=device, colocated=colocated, folder=Path("weights"), urls_here=[HERE]
    )


@pytest.mark.parametrize(
    ("transport", "device", "settings", "name", "reason"),
    [
        (None, "cpu", {}, "tensor (by value)", "run on this machine's cpu; no GPU handles: no"),
        (None, "cuda", {}, "tensor (GPU handles)", "run on this machine's cuda"),
        (None, "cuda", {"colocated": True}, "tensor (GPU handles)", "this machine's cuda"),
        (None, "cuda", {"python": Path("none/bin/python")}, "tensor (by value)", "unknown version"),
        ("distributed", "cpu", {}, "distributed (gloo)", "transport says so"),
        ("distributed", "cuda", {}, "distributed (nccl)", "transport says so"),
        ("disk", "cuda", {}, "disk", "transport says so"),
    ],
)
def test_transport_is_the_fastest_that_works_and_the_reason_is_told(
    caplog: pytest.LogCaptureFixture,
    transport: str | None,
    device: str,
    settings: dict[str, Any],
    name: str,
    reason: str,
) -> None:
    with caplog.at_level(logging.INFO):
        assert chosen(transport, device, **settings).name == name

    assert f"weight sync: {name}, because " in caplog.text
    assert reason in caplog.text


MIXED_GPU = "tensor (GPU handles) on this machine, distributed (nccl) elsewhere"
MIXED_CPU = "tensor (by value) on this machine, distributed (gloo) elsewhere"


@pytest.mark.parametrize(
    ("transport", "device", "colocated", "urls", "name", "reason"),
    [
        (None, "cpu", False, [THERE], "tensor (by value)", "the servers have no GPU"),
        (None, "cuda", False, [THERE], "distributed (nccl)", "GPUs of their own"),
        (None, "cuda", False, [HERE], "distributed (nccl)", "GPUs of their own"),
        ("tensor", "cuda", False, [HERE], "tensor (by value)", "the servers run elsewhere"),
        (None, "cuda", True, [HERE], "tensor (GPU handles)", "share the trainer's GPUs"),
        (None, "cuda", True, [THERE], "distributed (nccl)", "share no machine with rank 0"),
        (
            None,
            "cuda",
            True,
            [HERE, THERE],
            MIXED_GPU,
            f"on this machine {HERE}; elsewhere {THERE}",
        ),
        (None, "cpu", True, [HERE, THERE], MIXED_CPU, f"on this machine {HERE}; elsewhere {THERE}"),
        ("tensor", "cuda", True, [HERE, THERE], "tensor (by value)", "some servers run elsewhere"),
    ],
)
def test_servers_that_share_the_trainers_gpus_are_told_apart_by_their_machine(
    caplog: pytest.LogCaptureFixture,
    transport: str | None,
    device: str,
    *,
    colocated: bool,
    urls: list[str],
    name: str,
    reason: str,
) -> None:
    with caplog.at_level(logging.INFO):
        assert chosen(transport, device, *urls, colocated=colocated).name == name

    assert reason in caplog.text


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_in_segments_that_expand_is_sent_by_value(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str
) -> None:
    monkeypatch.setenv(variable, "max_split_size_mb:64,expandable_segments:True")

    with caplog.at_level(logging.INFO):
        assert chosen(None, "cuda").name == "tensor (by value)"

    assert f"{variable} has expandable_segments:True; leave it out" in caplog.text


def test_broadcast_to_servers_with_another_nccl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "own_nccl", lambda: "2.1.0")

    with pytest.raises(
        ValueError, match=r"one NCCL .* has [\d.]+ and the trainer 2\.1\.0; take 't"
    ):
        chosen("distributed", "cuda")
    assert chosen("distributed", "cuda", THERE).name == "distributed (nccl)"  # cannot be known
    assert chosen("distributed", "cpu").name == "distributed (gloo)"


def test_broadcast_to_colocated_servers_is_no_setting() -> None:
    settings = {"sglang": {"sync": {"transport": "distributed"}}}
    validate(RolloutConfig, settings, where="test")
    with pytest.raises(ConfigError, match="servers are on the trainer's; leave the transport out"):
        validate(RolloutConfig, {"colocated": True, **settings}, where="test")


def test_broadcast_to_colocated_servers_is_for_those_of_other_machines() -> None:
    settings = {"urls": [THERE], "sync": {"transport": "distributed"}}
    validate(RolloutConfig, {"colocated": True, "sglang": settings}, where="test")

    assert chosen("distributed", "cuda", THERE, colocated=True).name == "distributed (nccl)"
    with pytest.raises(ValueError, match=rf"rollout\.colocated {HERE} may be on rank 0's; leave"):
        chosen("distributed", "cuda", HERE, THERE, colocated=True)


def test_releases_are_those_that_the_other_interpreter_finds(tmp_path: Path) -> None:
    assert torch_release(OURS) == own_torch()
    assert torch.__version__.startswith(own_torch() + ".")
    assert nccl_version(OURS) == own_nccl()
    # As in an image whose packages are not beside the interpreter.
    elsewhere = tmp_path / "python"
    elsewhere.write_text(f'#!/bin/sh\nexec {OURS.absolute()} "$@"\n')
    elsewhere.chmod(0o755)
    assert (torch_release(elsewhere), nccl_version(elsewhere)) == (own_torch(), own_nccl())
    nowhere = Path("/nowhere/bin/python")
    assert (torch_release(nowhere), nccl_version(nowhere)) == ("", "")
