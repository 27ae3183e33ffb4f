"""Times conversion both ways against a plain copy of the same bytes, and measures its memory.

    python -m tests.support.conversion_speed FOLDER [--size qwen3-8b|qwen3-0.6b]

Makes a model of real shapes with random weights in FOLDER, which must have room for three times
its size, and removes everything again. Copies, which are durable like the conversions, come before,
between and after them, so that a machine that is busy with other work slows both alike; what is
read is dropped from the page cache before each.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prefixrl_mcore.checkpoint.convert.hf_writer import write_hf_folder
from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf, convert_to_hf
from prefixrl_mcore.checkpoint.convert.rules import ModelDims, find_table
from prefixrl_mcore.checkpoint.convert.safetensors_file import TensorInfo
from prefixrl_mcore.observability.memory import MemoryWatch

_SHARED = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}
SIZES = {
    "qwen3-8b": {
        **_SHARED,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        **_SHARED,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
}


class RandomWeights:
    """Random bfloat16 weights of a config, made when they are read."""

    def __init__(self, config: Mapping[str, object]) -> None:
        """Take names and shapes from the family's table."""
        shapes = find_table(config).hf_shapes(ModelDims.from_hf_config(config))
        self.infos = {
            name: TensorInfo(shape=shape, dtype=torch.bfloat16) for name, shape in shapes.items()
        }
        self._generator = np.random.Generator(np.random.SFC64(0))

    def read(self, name: str) -> Tensor:
        """Return new random numbers, finite and of the size of weights."""
        info = self.infos[name]
        number = torch.Size(info.shape).numel()
        bits = self._generator.integers(0, 1 << 16, number, dtype=np.uint16)
        bits = (bits & 0x83FF) | 0x3C00  # exponents from 2**-7 to 1, any sign and fraction
        return torch.from_numpy(bits).view(torch.bfloat16).view(info.shape)

    def prefetch(self, name: str) -> None:
        """Do nothing."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="qwen3-8b")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder: Path = arguments.folder
    folder.mkdir(parents=True)
    try:
        measure(folder, SIZES[arguments.size])
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, config: Mapping[str, object]) -> None:
    """Print one line per conversion and copy."""
    assets, model = folder / "assets", folder / "model"
    assets.mkdir()
    (assets / "config.json").write_text(json.dumps(config))
    write_hf_folder(RandomWeights(config), assets, model)
    num_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    copies = [timed_copy(model, folder / "copy")]
    timed("from-hf", model, num_bytes, lambda: convert_from_hf(model, folder / "checkpoint"))
    copies.append(timed_copy(model, folder / "copy"))
    timed(
        "to-hf",
        folder / "checkpoint",
        num_bytes,
        lambda: convert_to_hf(folder / "checkpoint", folder / "out"),
    )
    copies.append(timed_copy(model, folder / "copy"))
    for path in sorted(model.glob("*.safetensors")):
        assert is_equal(path, folder / "out" / path.name), f"{path.name} differs"
    say(f"copy: median {statistics.median(copies):.1f} s; there and back equal, byte for byte")


def timed_copy(source: Path, target: Path) -> float:
    """Time a plain, durable copy of the weight files, and remove it."""
    num_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))

    def copy() -> None:
        target.mkdir()
        for path in sorted(source.glob("*.safetensors")):
            shutil.copyfile(path, target / path.name)
            descriptor = os.open(target / path.name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    seconds = timed("copy", source, num_bytes, copy)
    shutil.rmtree(target)
    return seconds


def timed(name: str, source: Path, num_bytes: int, work: Callable[[], object]) -> float:
    """Run ``work`` with ``source`` on disk only; print seconds, speed and memory."""
    os.sync()
    for path in (path for path in source.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    processor, start = time.process_time(), time.perf_counter()
    with MemoryWatch() as memory:
        work()
    seconds = time.perf_counter() - start
    say(
        f"{name}: {num_bytes / 1e9:.2f} GB in {seconds:.1f} s, {num_bytes / 1e9 / seconds:.2f} "
        f"GB/s, {time.process_time() - processor:.1f} s of processor, memory "
        f"{memory.start_bytes / 1e9:.2f} GB before, {memory.peak_bytes / 1e9:.2f} GB at most"
    )
    return seconds


def say(line: str) -> None:
    """Write a line of the result."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def is_equal(one: Path, other: Path) -> bool:
    """Compare two files."""
    with one.open("rb") as first, other.open("rb") as second:
        while block := first.read(1 << 24):
            if block != second.read(1 << 24):
                return False
        return not second.read(1)


if __name__ == "__main__":
    main()
