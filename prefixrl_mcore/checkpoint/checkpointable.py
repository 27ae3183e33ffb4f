"""What saving and loading need of a policy."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from prefixrl_mcore.checkpoint.convert.hf_folder import CONFIG_NAME, copy_assets


class Trainable(Protocol):
    """The Megatron objects of a policy."""

    @property
    def model_chunks(self) -> Sequence[nn.Module]:
        """This rank's model chunks, wrapped or not."""
        ...

    @property
    def optimizer(self) -> Any:  # noqa: ANN401  (Megatron's optimizers share no typed base)
        """Megatron's optimizer."""
        ...

    @property
    def scheduler(self) -> Any:  # noqa: ANN401  (untyped upstream)
        """Megatron's schedule of learning rate and weight decay."""
        ...


class CheckpointablePolicy(Trainable, Protocol):
    """What saving and loading need of a policy."""

    hf_config: dict[str, Any]
    """Content of the model's ``config.json``."""

    model_path: Path | None
    """Hugging Face folder whose tokenizer and config files belong to the model; None if there is
    none, and a checkpoint then gets only ``hf_config``."""

    seed: int
    """Seed of the run, from which random states are derived where none fit."""

    policy_version: int
    """Optimizer steps applied to the weights."""


def write_hf_files(folder: Path, policy: CheckpointablePolicy) -> None:
    """Write what a conversion to Hugging Face will need besides the weights."""
    if policy.model_path is not None:
        copy_assets(policy.model_path, folder)
        return
    folder.mkdir()
    (folder / CONFIG_NAME).write_text(json.dumps(policy.hf_config, indent=2), encoding="utf-8")
