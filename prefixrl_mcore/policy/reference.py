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

_SMALLEST_PART = 2**16
"""Numbers; the rounding of a rest below it is not worth further copies."""


class FrozenReference:
    """The weights that the model chunks of this rank had when it was made."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Copy the present weights of the chunks to the host."""
        self._parameters = [p for chunk in chunks for p in chunk.parameters()]
        self._weights, self._aside = self._copy_to_host(), self._copy_to_host()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the reference's weights, and its own ones back afterwards."""
        self._read(self._aside)
        try:
            self._write(self._weights)  # whatever stops it half-way, the policy's come back
            yield
        finally:
            self._write(self._aside)

    def _copy_to_host(self) -> list[Tensor]:
        """Return the present weights in host memory, as ``_parts`` cuts them; pinned for a GPU."""
        kept = [
            torch.empty(part.shape, dtype=part.dtype, device="cpu", pin_memory=part.is_cuda)
            for part in self._parts()
        ]
        self._read(kept)
        return kept

    def _read(self, kept: Sequence[Tensor]) -> None:
        """Copy the present weights into ``kept``."""
        for copy, part in zip(kept, self._parts(), strict=True):
            copy.copy_(part)

    def _write(self, kept: Sequence[Tensor]) -> None:
        """Copy ``kept`` into the model."""
        for copy, part in zip(kept, self._parts(), strict=True):
            part.copy_(copy)

    def _parts(self) -> Iterator[Tensor]:
        """Yield the weights as vectors whose sizes torch's pinned memory does not round up."""
        for parameter in self._parameters:
            yield from parameter.detach().view(-1).split(power_of_two_parts(parameter.numel()))


def power_of_two_parts(number: int) -> list[int]:
    """Return powers of two that add up to ``number``, and a rest that is smaller than 2^16.

    torch rounds every allocation of pinned memory up to a power of two, which would be a third
    more of it on average, and nearly twice of it at worst.
    """
    parts: list[int] = []
    while number >= _SMALLEST_PART:
        parts.append(1 << (number.bit_length() - 1))
        number -= parts[-1]
    return [*parts, number] if number else parts
