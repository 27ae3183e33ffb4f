import logging
import sys
from pathlib import Path

import pytest
import torch

from prefixrl_mcore.config.rollout import SyncConfig
from prefixrl_mcore.rollout.weight_sync.choose import choose_transport, torch_release

OURS = Path(sys.executable)


@pytest.mark.parametrize(
    ("transport", "device", "python", "name", "reason"),
    [
        (None, "cpu", OURS, "tensor (by value)", "run on this machine's cpu; no GPU handles: no"),
        (None, "cpu", None, "tensor (by value)", "the servers have no GPU"),
        (None, "cuda", OURS, "tensor (GPU handles)", "run on this machine's cuda"),
        (None, "cuda", Path("none/bin/python"), "tensor (by value)", "torch of unknown version"),
        (None, "cuda", None, "distributed (nccl)", "have GPUs and run elsewhere"),
        ("tensor", "cuda", None, "tensor (by value)", "no GPU handles: the servers run elsewhere"),
        ("distributed", "cpu", OURS, "distributed (gloo)", "transport says so"),
        ("disk", "cuda", OURS, "disk", "transport says so"),
    ],
)
def test_transport_is_the_fastest_that_works_and_the_reason_is_told(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    transport: str | None,
    device: str,
    python: Path | None,
    name: str,
    reason: str,
) -> None:
    config = SyncConfig.model_validate({"transport": transport})

    with caplog.at_level(logging.INFO):
        chosen = choose_transport(config, device=device, server_python=python, folder=tmp_path)

    assert chosen.name == name
    assert f"weight sync: {name}, because " in caplog.text
    assert reason in caplog.text


def test_release_of_torch_is_read_without_starting_the_other_interpreter() -> None:
    assert torch.__version__.startswith(torch_release(OURS) + ".")
    assert torch_release(Path("/nowhere/bin/python")) == ""
