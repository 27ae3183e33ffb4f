"""The frozen reference policy of a KL term: another set of weights for the same model.

Its weights are kept in host memory, each rank its own shards, and change places with the policy's
for one forward pass a step. The device then needs no second model; the host needs the weights of a
rank twice, and a step moves them three times. The optimizer's float32 copies are not touched, and
the policy's weights come back bit for bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class FrozenReference:
    """The weights that the model chunks of this rank had when it was made."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Copy the present weights of the chunks to the host."""
        self._parameters = [p for chunk in chunks for p in chunk.parameters()]
        self._weights = [_host_copy(parameter) for parameter in self._parameters]
        self._aside = [_host_copy(parameter) for parameter in self._parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the reference's weights, and its own ones back afterwards."""
        for kept, parameter in zip(self._aside, self._parameters, strict=True):
            kept.copy_(parameter.detach())
        self._write(self._weights)
        try:
            yield
        finally:
            self._write(self._aside)

    def _write(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self._parameters, weights, strict=True):
                parameter.copy_(weight)


def _host_copy(parameter: Tensor) -> Tensor:
    """Return a copy in host memory, pinned where a GPU reads it."""
    copy = torch.empty(
        parameter.shape, dtype=parameter.dtype, device="cpu", pin_memory=parameter.is_cuda
    )
    return copy.copy_(parameter.detach())
