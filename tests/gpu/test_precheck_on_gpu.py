"""The GPU part of the node pre-check against the real driver; never run on a GPU so far."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.cuda import nccl

from prefixrl_mcore.launch.slurm.precheck.gpus import check_gpus

ANYTHING_GIB = 1e6
PROBE_SECONDS = 300.0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _check(num: int, max_memory_used_gib: float = ANYTHING_GIB) -> tuple[dict[str, Any], list[str]]:
    return check_gpus(num, max_memory_used_gib=max_memory_used_gib, probe_seconds=PROBE_SECONDS)


@pytest.fixture
def two_gib() -> Iterator[torch.Tensor]:
    """Hold 2 GiB of GPU 0, as a process that another job has left would."""
    held = torch.zeros(2 * 2**30, dtype=torch.uint8, device="cuda:0")
    torch.cuda.synchronize()
    yield held
    del held
    torch.cuda.empty_cache()


def test_healthy_gpus_have_no_fault_and_tell_what_torch_tells() -> None:
    number = torch.cuda.device_count()
    facts, faults = _check(number)
    assert faults == []
    assert facts["gpus"] == sorted({torch.cuda.get_device_name(i) for i in range(number)})
    assert (facts["torch"], facts["cuda"]) == (torch.__version__, torch.version.cuda)
    assert facts["nccl"] == ".".join(map(str, nccl.version()))
    (driver,) = facts["driver"]
    assert int(driver.partition(".")[0]) >= 450


def test_more_gpus_than_there_are_are_missed_by_driver_and_torch() -> None:
    number = torch.cuda.device_count()
    _, faults = _check(number + 1)
    assert faults == [
        f"{number} GPUs, {number + 1} were asked for",
        f"torch sees {number} GPUs, {number + 1} were asked for",
    ]


def test_memory_that_somebody_holds_is_named(two_gib: torch.Tensor) -> None:
    _, faults = _check(torch.cuda.device_count(), max_memory_used_gib=1)
    assert any("GiB are in use, at most 1 may be" in fault for fault in faults), faults


def test_gpus_that_the_job_was_not_given_are_seen_by_neither(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uuid = torch.cuda.get_device_properties(0).uuid
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"GPU-{uuid}")
    assert _check(1)[1] == []
    assert "1 GPUs, 2 were asked for" in _check(2)[1]
