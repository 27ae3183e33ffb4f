"""The GPU part of the pre-check: what nvidia-smi and torch say, and what is made of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.launch.slurm.precheck.gpus import check_gpus


def _driver(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Let nvidia-smi be a script, and all of its GPUs the job's."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program = folder / "nvidia-smi"
    program.write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def _check(num: int, probe: dict[str, Any] | str | None = None) -> tuple[dict[str, Any], list[str]]:
    good = {"torch": "2", "cuda": "12.9", "nccl": "2.27", "num_gpus": num, "faults": {}}
    said = probe if isinstance(probe, str) else json.dumps({**good, **(probe or {})})
    command = ["bash", "-c", said if isinstance(probe, str) else f"echo '{said}'"]
    return check_gpus(num, max_memory_used_gib=2, probe_seconds=5, probe=command)


def _row(index: int = 0, **said: str) -> str:
    """Return how nvidia-smi 550 tells of a healthy H100, with other values for some fields."""
    fields = {
        "index": str(index),
        "uuid": f"GPU-{index}e2cde87-5d8b-1d7b-77b2-2f8a3c2c7e0{index}",
        "name": "NVIDIA H100 80GB HBM3",
        "driver": "550.54.15",
        "memory": "4",
        "errors": "0",
        "mig": "Disabled",
    }
    return "echo '" + ", ".join({**fields, **said}.values()) + "'"


def _remapped(of_first: str = "No, No") -> str:
    """Return how it answers the query of remapped rows, pending and failed."""
    uuids = [_row(index).split(", ")[1] for index in range(2)]
    lines = f"{uuids[0]}, {of_first}\\n{uuids[1]}, No, No"
    return f"if [[ $1 == --query-remapped* ]]; then echo -e '{lines}'; exit; fi"


def test_good_gpus_tell_their_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(tmp_path, monkeypatch, _remapped(), _row(), _row(1, errors="[N/A]"))
    facts, faults = _check(2)
    assert faults == []
    assert facts == {
        "gpus": ["NVIDIA H100 80GB HBM3"],
        "driver": ["550.54.15"],
        "torch": "2",
        "cuda": "12.9",
        "nccl": "2.27",
    }


@pytest.mark.parametrize("said", ["[N/A]", "[Not Supported]", "[Insufficient Permissions]"])
def test_what_a_gpu_does_not_tell_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    silent = dict.fromkeys(("memory", "errors", "mig"), said)
    row = _row(name="NVIDIA GeForce RTX 4090", **silent)
    _driver(tmp_path, monkeypatch, _remapped(f"{said}, {said}"), row)
    assert _check(1)[1] == []
    unknown = 'Field "remapped_rows.pending" is not a valid field to query.'
    refused = f"if [[ $1 == --query-remapped* ]]; then echo '{unknown}'; exit 2; fi"
    _driver(tmp_path, monkeypatch, refused, row)
    assert _check(1)[1] == []


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        pytest.param(
            [
                "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA "
                "driver.'; exit 9"
            ],
            "nvidia-smi fails with exit code 9: NVIDIA-SMI has failed because",
            id="no driver",
        ),
        pytest.param(
            [
                "echo 'Failed to initialize NVML: Driver/library version mismatch'",
                "echo 'NVML library version: 550.54'; exit 18",
            ],
            "nvidia-smi fails with exit code 18: Failed to initialize NVML: Driver/library version "
            "mismatch NVML library version: 550.54",
            id="updated driver",
        ),
        pytest.param(
            ["echo 'No devices were found'; exit 6"],
            "nvidia-smi fails with exit code 6: No devices were found",
            id="no GPU",
        ),
        pytest.param(["echo 'No devices were found'"], "nvidia-smi answers what", id="no GPU, 0"),
        pytest.param(
            [
                _row(),
                "echo 'Unable to determine the device handle for GPU0000:5D:00.0: GPU is lost.  "
                "Reboot the system to recover this GPU'; exit 15",
            ],
            "nvidia-smi fails with exit code 15: Unable to determine the device handle for "
            "GPU0000:5D:00.0: GPU is lost.",
            id="off the bus, Xid 79",
        ),
        pytest.param([_row()], "1 GPUs, 2 were asked for", id="fewer"),
        pytest.param(
            [_row(), _row(1, memory="[Unknown Error]")],
            "GPU 1: the driver cannot read memory.used ([Unknown Error])",
            id="unknown error, Xid 119",
        ),
        pytest.param(
            [_row(), _row(1, errors="[GPU requires reset]")],
            "GPU 1: the driver cannot read ecc.errors.uncorrected.volatile.total ([GPU requires",
            id="to be reset, Xid 95",
        ),
        pytest.param(
            [_row(), _row(1, errors="3")],
            "GPU 1: 3 uncorrected memory errors",
            id="memory errors, Xid 48",
        ),
        pytest.param(
            [_remapped("Yes, No"), _row(), _row(1)],
            "GPU 0: rows of its memory are replaced only after a reset",
            id="rows to be remapped, Xid 63",
        ),
        pytest.param(
            [_remapped("0, 1"), _row(), _row(1)],
            "GPU 0: rows of its memory are broken and cannot be replaced",
            id="rows that cannot be, Xid 64",
        ),
        pytest.param(
            [_row(), _row(1, mig="Enabled", memory="60000")],
            "GPU 1 is split into instances (MIG)",
            id="MIG",
        ),
        pytest.param(
            [_row(memory="30720"), _row(1)],
            "GPU 0: 30.0 GiB are in use, at most 2 may be",
            id="in use",
        ),
    ],
)
def test_bad_gpus_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], fault: str
) -> None:
    _driver(tmp_path, monkeypatch, *lines)
    (said,) = _check(2)[1]
    assert said.startswith(fault)


def test_a_missing_driver_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "bash").symlink_to("/bin/bash")
    (said,) = _check(1)[1]
    assert said.startswith("nvidia-smi cannot be run: No such file or directory")


def test_one_instance_of_a_split_gpu_may_be_used_whatever_the_others_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _driver(tmp_path, monkeypatch, _row(mig="Enabled", memory="60000"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0e2cde87-5d8b-1d7b-77b2-2f8a3c2c7e0a")
    assert _check(1)[1] == []


@pytest.mark.parametrize("visible", ["1", "GPU-1e2cde87-5d8b-1d7b-77b2-2f8a3c2c7e01"])
def test_gpus_of_other_jobs_on_the_node_are_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    _driver(tmp_path, monkeypatch, _row(memory="70000", errors="1"), _row(1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _check(1)[1] == []
    assert _check(2)[1] == ["1 GPUs, 2 were asked for"]


@pytest.mark.parametrize(
    ("probe", "fault"),
    [
        ({"num_gpus": 1}, "torch sees 1 GPUs, 2 were asked for"),
        ({"faults": {"1": "CUDA error: uncorrectable"}}, "GPU 1: CUDA error: uncorrectable"),
        ("echo no module named torch >&2; exit 1", "torch fails with exit code 1: no module"),
        ("sleep 60", "torch does not end within 5 s"),
    ],
)
def test_gpus_that_do_not_compute_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: dict[str, Any] | str, fault: str
) -> None:
    _driver(tmp_path, monkeypatch, _row(), _row(1))
    (said,) = _check(2, probe)[1]
    assert fault in said


def test_the_probe_answers_without_a_gpu_and_a_site_of_cpus_asks_nothing() -> None:
    command = [sys.executable, "-m", "prefixrl_mcore.policy.device_probe"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["num_gpus"] == 0
    assert check_gpus(0, max_memory_used_gib=0, probe_seconds=0) == ({}, [])


def test_a_probe_that_says_something_else_is_a_fault_and_no_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _driver(tmp_path, monkeypatch, _row())
    for said in ("echo Segmentation fault", "echo '[]'", "echo '{}'"):
        (fault,) = _check(1, said)[1]
        assert "torch answers what was not asked" in fault
