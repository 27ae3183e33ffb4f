"""What saving and loading need of a policy."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from prefixrl_mcore.checkpoint.convert.hf_folder import CONFIG_NAME, write_assets


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
    """Hugging Face folder that the weights came from, for messages; None if there is none."""

    model_files: Mapping[str, bytes]
    """Content of that folder's config and tokenizer files when it was read, by path in it. Rank 0
    has them and writes them into checkpoints, which get only ``hf_config`` if there are none."""

    seed: int
    """Seed of the run, from which random states are derived where none fit."""

    policy_version: int
    """Optimizer steps applied to the weights."""


def write_hf_files(folder: Path, policy: CheckpointablePolicy) -> None:
    """Write what a conversion to Hugging Face will need besides the weights."""
    config = json.dumps(policy.hf_config, indent=2).encode()
    write_assets(policy.model_files or {CONFIG_NAME: config}, folder)
