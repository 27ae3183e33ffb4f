"""Weights in memory and in folders, for tests of conversion."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from prefixrl_mcore.checkpoint.convert.hf_folder import HfWeights
from prefixrl_mcore.checkpoint.convert.safetensors_file import TensorInfo


class HeldWeights:
    """Weights in memory, where a converter expects a folder or a checkpoint."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Offer the tensors in their order."""
        self._tensors = dict(tensors)
        self.infos = {
            name: TensorInfo(shape=tuple(tensor.shape), dtype=tensor.dtype)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """Return one weight."""
        return self._tensors[name]

    def prefetch(self, name: str) -> None:
        """Do nothing."""


def weights_in(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a Hugging Face folder."""
    with HfWeights(folder) as weights:
        return {name: weights.read(name) for name in weights.infos}


def assert_same_bits(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    """Fail unless names, types, shapes and all bits are the same."""
    assert ours.keys() == truth.keys(), sorted(ours.keys() ^ truth.keys())
    for name, tensor in truth.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name
