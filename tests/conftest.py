"""What all tests share: an environment that is nobody's, fixtures, and what may not be skipped."""

# ruff: noqa: E402 - OpenMP, Triton and cuBLAS read these variables when they are first used

import os
from pathlib import Path

_OF_THE_USER = {
    *("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "WANDB_RUN_ID"),
    *("PREFIXRL_SITES", "PREFIXRL_SGLANG_API_KEY"),
}
"""What a shell, a job or a terminal may have set, and what is printed or started depends on."""

for _name in list(os.environ):
    if _name in _OF_THE_USER or _name.startswith("SLURM_"):
        del os.environ[_name]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in one order, whatever ran before

_HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*"))  # without torch, which would import Triton
if not _HAS_GPU or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms need it

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.tiny_run import TinyTask

_PROMISES = {
    "gpu": "PREFIXRL_REQUIRE_GPU",
    "slurm": "PREFIXRL_REQUIRE_SLURM",
    "mount": "PREFIXRL_REQUIRE_SLURM",  # the cluster needs the same rights
}
"""Marker of a test, and the variable that is 1 where the machine has what the test needs."""

CAPABILITY_SKIP = "Skipped: this GPU has no "
"""How pytest tells of a skip whose reason is the compute capability."""


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> "TinyTask":
    """A base policy with problems, traces and prefixes; shared, never written to."""
    # Here and not above: the kernels' tests run on machines that have no trainer.
    from tests.support.tiny_run import build_tiny_task

    return build_tiny_task(tmp_path_factory.mktemp("tiny-task"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Turn a skip into a failure where the machine was promised to have what is missing.

    What a GPU of its kind cannot do is no such promise: a reason that begins with
    ``CAPABILITY_SKIP`` stays a skip.
    """
    report = yield
    for marker, variable in _PROMISES.items():
        is_required = (
            item.get_closest_marker(marker) is not None and os.environ.get(variable) == "1"
        )
        if is_required and report.skipped and CAPABILITY_SKIP not in str(report.longrepr):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} skipped although {variable}=1: {report.longrepr}"
    return report
