"""A conversion holds a weight or two, however many the model has."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prefixrl_mcore.checkpoint.convert.hf_writer import write_hf_folder
from tests.support.conversion_speed import RandomWeights

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 32,
    "hidden_size": 256,
    "intermediate_size": 32_768,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 12,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "vocab_size": 512,
}
LARGEST_GB = 2 * 32_768 * 256 * 4 / 1e9
"""The gate and up rows of a layer in float32, as a checkpoint stores them."""

_PEAK = re.compile(r"peak memory ([\d.]+) GB \(([\d.]+) GB before it began\)")


def _growth_gb(*arguments: object) -> float:
    """Run ``prefixrl convert`` and return by how much its anonymous memory grew."""
    command = [sys.executable, "-m", "prefixrl_mcore.cli", "convert", *map(str, arguments)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    match = _PEAK.search(shown)
    assert match is not None, shown
    return float(match[1]) - float(match[2])


@pytest.mark.slow
def test_memory_is_that_of_the_largest_weight(tmp_path: Path) -> None:
    assets, model = tmp_path / "assets", tmp_path / "model"
    assets.mkdir()
    (assets / "config.json").write_text(json.dumps(CONFIG))
    write_hf_folder(RandomWeights(CONFIG), assets, model)
    num_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert num_bytes / 1e9 > 8 * LARGEST_GB / 2  # in bfloat16
    there = _growth_gb("from-hf", model, tmp_path / "checkpoint", "--dtype", "fp32")
    back = _growth_gb("to-hf", tmp_path / "checkpoint", tmp_path / "back", "--dtype", "bf16")
    # The weight as it was read and as it is stored, and buffers; the whole model is 0.6 GB.
    assert 0 < there < 2 * LARGEST_GB + 0.1
    assert back < 2 * LARGEST_GB + 0.1
