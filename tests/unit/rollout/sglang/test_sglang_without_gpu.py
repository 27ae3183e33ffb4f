"""The hash that a deterministic server on a CPU draws its tokens with."""

import importlib.util
import struct
from types import ModuleType

import pytest
import torch

from prefixrl_mcore.rollout.sglang.launch import LAUNCHER


@pytest.fixture(scope="module")
def without_gpu() -> ModuleType:
    """The launcher's module, which is no part of the package: SGLang's interpreter runs it."""
    path = LAUNCHER.with_name("without_gpu.py")
    spec = importlib.util.spec_from_file_location("without_gpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def murmur3(data: bytes) -> int:
    """MurmurHash3 x86 32 with seed 0, of whole four-byte blocks."""
    mask = 0xFFFFFFFF

    def rotate(value: int, bits: int) -> int:
        return ((value << bits) | (value >> (32 - bits))) & mask

    hashed = 0
    for (block,) in struct.iter_unpack("<I", data):
        hashed ^= (rotate((block * 0xCC9E2D51) & mask, 15) * 0x1B873593) & mask
        hashed = (rotate(hashed, 13) * 5 + 0xE6546B64) & mask
    hashed ^= len(data)
    hashed = ((hashed ^ (hashed >> 16)) * 0x85EBCA6B) & mask
    hashed = ((hashed ^ (hashed >> 13)) * 0xC2B2AE35) & mask
    return hashed ^ (hashed >> 16)


def test_reference_knows_a_published_value() -> None:
    assert murmur3(b"test") == 0xBA6BD213


def test_hash_is_murmur3_of_seed_position_and_column(without_gpu: ModuleType) -> None:
    seeds = [0, 1, 42, 2**31, 2**62 + 12345, 2**63 - 1]
    positions, columns = [0, 1, 7, 100, 35999, 2**20], [0, 1, 5, 151935]

    hashed = without_gpu._murmur_hash32(
        torch.tensor(seeds).to(torch.uint64), torch.tensor(positions), torch.tensor(columns)
    )

    assert hashed.dtype == torch.uint32
    assert hashed.tolist() == [
        [murmur3(struct.pack("<QII", seed, position, column)) for column in columns]
        for seed, position in zip(seeds, positions, strict=True)
    ]
