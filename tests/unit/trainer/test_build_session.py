"""What a start refuses before it loads anything."""

import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.rollout import RolloutConfig, SGLangConfig
from prefixrl_mcore.trainer import build
from prefixrl_mcore.trainer.build import build_session


class _LoadedError(Exception):
    """The checks were passed."""


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise _LoadedError

    monkeypatch.setattr(build, "PromptRenderer", load)
    monkeypatch.setattr(build, "run_on_first", lambda action: action())
    monkeypatch.setattr(build, "num_local_ranks", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def built_on(device: str, rollout: RolloutConfig) -> None:
    """Build a session up to the first thing that is loaded."""
    model = SimpleNamespace(path="nowhere")
    config: Any = SimpleNamespace(rollout=rollout, model=model, data=SimpleNamespace(prompt=None))
    nothing: Any = None
    topology: Any = SimpleNamespace(device=torch.device(device))
    with pytest.raises(_LoadedError), ExitStack() as stack:
        build_session(config, nothing, topology, stack, phases=nothing, stop=nothing)


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    ("engine", "refusal"),
    [
        (None, pytest.raises(ConfigError, match="got 2 > 1; lower it")),
        ("transformers", nullcontext()),
    ],
)
def test_too_few_servers_are_refused_before_anything_is_loaded(
    engine: Any, refusal: AbstractContextManager[object]
) -> None:
    with refusal:
        built_on("cpu", RolloutConfig(engine=engine, sglang=SGLangConfig(min_servers=2)))


@pytest.mark.usefixtures("one_gpu")
def test_one_gpu_for_trainer_and_server_is_refused_only_where_a_server_would_start() -> None:
    both = r"= 2 GPUs.*has 1; set rollout.colocated = true .* or rollout.engine = \"transformers\""
    there, missing = SGLangConfig(python=Path(sys.executable)), SGLangConfig(python=Path("nowhere"))
    for rollout in (RolloutConfig(sglang=there), RolloutConfig(engine="sglang", sglang=missing)):
        with pytest.raises(ConfigError, match=both):
            built_on("cuda", rollout)
    built_on("cuda", RolloutConfig(sglang=missing))
    built_on("cuda", RolloutConfig(sglang=there, colocated=True))
