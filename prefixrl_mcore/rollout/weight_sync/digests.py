"""The digests that SGLang's weights checker reports, computed here, piece by piece.

It hashes every tensor that a rank holds: with SHA-256 on a CPU, and on a GPU with a sum of mixed
words whose positions count. Both are fed with the bytes of a tensor in order, so that a tensor
that a server keeps fused never has to exist as a whole on this side.
"""

import hashlib
from typing import Protocol

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MASK_64 = 0xFFFFFFFFFFFFFFFF
_TILE_WORDS = 8192
_CHUNK_WORDS = 1024 * _TILE_WORDS
"""Words that are mixed at a time; each takes some 60 bytes meanwhile."""

_SEED_1 = 0x243F6A88
_SEED_2 = ((_SEED_1 * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK
_STREAMS = ((0x27D4EB2D, _SEED_1, 15), (0x165667B1, _SEED_2, 13))
"""(factor, seed, rotation) of a word's position, for the upper and the lower half."""

_MIX_1, _MIX_2 = 0x85EBCA6B, 0xC2B2AE35


class Digest(Protocol):
    """Digest of one tensor of a server."""

    def update(self, piece: Tensor) -> None:
        """Add the next elements, in the server's type."""
        ...

    def value(self) -> str:
        """Return what SGLang reports: 16 hexadecimal digits."""
        ...


class CpuDigest:
    """What a server on a CPU reports."""

    def __init__(self) -> None:
        """Begin with no bytes."""
        self._sha = hashlib.sha256()

    def update(self, piece: Tensor) -> None:
        """Add the bytes of ``piece``."""
        self._sha.update(memoryview(_bytes_of(piece.cpu()).numpy()))

    def value(self) -> str:
        """Return the first eight bytes of the hash."""
        return self._sha.digest()[:8].hex()


class GpuDigest:
    """What a server on a GPU reports; computed on the device of the pieces, also on a CPU."""

    def __init__(self) -> None:
        """Begin with no words."""
        self._num_words = 0
        self._sums = torch.zeros(2, 0, dtype=torch.int64)  # [2, tiles] on the CPU
        self._rest = torch.empty(0, dtype=torch.uint8)

    def update(self, piece: Tensor) -> None:
        """Add the bytes of ``piece``; those that do not fill a word wait for the next piece."""
        data = _bytes_of(piece)
        if self._rest.numel():
            data = torch.cat([self._rest.to(data.device), data])
        whole = data.numel() - data.numel() % 4
        self._rest = data[whole:].clone()
        if whole:
            for words in data[:whole].clone().view(torch.int32).split(_CHUNK_WORDS):
                self._add_words(words)

    def value(self) -> str:
        """Return the sum of all tiles, mixed once more."""
        if self._rest.numel():
            padding = torch.zeros(4 - self._rest.numel(), dtype=torch.uint8)
            self._add_words(torch.cat([self._rest.cpu(), padding]).view(torch.int32))
            self._rest = self._rest[:0]
        if not self._num_words:
            return f"{0:016x}"
        mixed_1, mixed_2 = _mix((self._sums & _MASK) ^ (self._num_words * 4 & _MASK))
        total = int(((mixed_1 << 32) | mixed_2).sum())  # wraps as it should
        return f"{_final(total & _MASK_64):016x}"

    def _add_words(self, words: Tensor) -> None:
        """Add 32-bit words at the next positions to the sums of their tiles."""
        positions = torch.arange(
            self._num_words, self._num_words + words.numel(), device=words.device
        )
        self._num_words += words.numel()
        num_tiles = -(-self._num_words // _TILE_WORDS)
        self._sums = torch.nn.functional.pad(self._sums, (0, num_tiles - self._sums.shape[1]))
        tiles = positions // _TILE_WORDS
        first = int(tiles[0])
        values, index = words.to(torch.int64) & _MASK, positions & _MASK
        for row, (factor, seed, turn) in enumerate(_STREAMS):
            position = ((index * factor + seed) & _MASK) ^ _rotated(index, turn)
            sums = torch.zeros(num_tiles - first, dtype=torch.int64, device=words.device)
            sums.index_add_(0, tiles - first, _mix(values ^ position))
            self._sums[row, first:] += sums.cpu()


def _bytes_of(piece: Tensor) -> Tensor:
    return piece.detach().contiguous().view(-1).view(torch.uint8)


def _rotated(x: Tensor, turn: int) -> Tensor:
    return ((x << turn) | (x >> (32 - turn))) & _MASK


def _mix(x: Tensor) -> Tensor:
    """Return mixed 32-bit words; that products wrap at 64 bits changes nothing."""
    x = x ^ (x >> 16)
    x = (x * _MIX_1) & _MASK
    x = x ^ (x >> 13)
    x = (x * _MIX_2) & _MASK
    return x ^ (x >> 16)


def _final(x: int) -> int:
    x ^= x >> 30
    x = (x * 0xBF58476D1CE4E5B9) & _MASK_64
    x ^= x >> 27
    x = (x * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)
