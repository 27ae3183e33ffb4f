"""``prefixrl check``: arithmetic against hand-worked sizes, and refusals."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.data import DataConfig
from prefixrl_mcore.config.policy import ModelConfig, ParallelConfig, PolicyConfig
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.launch.check import (
    check_layout,
    estimate_memory,
    print_check,
    read_model_size,
)

QWEN3_4B = {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "tie_word_embeddings": True,
}


def _config(folder: Path, parallel: ParallelConfig | None = None) -> RunConfig:
    (folder / "config.json").write_text(json.dumps(QWEN3_4B))
    return RunConfig(
        run_folder=folder / "run",
        model=ModelConfig(path=folder),
        data=DataConfig(problems=folder / "p.jsonl"),
        policy=PolicyConfig(parallel=parallel or ParallelConfig()),
    )


def test_parameters_of_qwen3_4b(tmp_path: Path) -> None:
    size = read_model_size(_config(tmp_path).model.path)
    attention = 2 * 2560 * 128 * (32 + 8)
    assert size.num_parameters == 36 * (attention + 3 * 2560 * 9728) + 151936 * 2560
    assert size.num_parameters == pytest.approx(4.02e9, rel=0.01)


def test_tensor_parallelism_divides_weights_gradients_and_optimizer(tmp_path: Path) -> None:
    config = _config(tmp_path)
    size = read_model_size(config.model.path)
    one = estimate_memory(config, size)
    two = estimate_memory(_config(tmp_path, ParallelConfig(tensor_model_parallel_size=2)), size)
    assert one.weights == 2 * size.num_parameters
    assert one.gradients == 4 * size.num_parameters
    assert one.optimizer == 12 * size.num_parameters
    for part in ("weights", "gradients", "optimizer", "head"):
        assert getattr(two, part) == pytest.approx(getattr(one, part) / 2)


def test_a_layout_that_does_not_divide_shows_the_arithmetic(tmp_path: Path) -> None:
    config = _config(tmp_path, ParallelConfig(pipeline_model_parallel_size=5))
    with pytest.raises(ConfigError, match=r"36 / 5 = 7\.20\); choose a divisor of 36"):
        check_layout(config, read_model_size(tmp_path))


def test_the_table_says_what_would_run_and_what_is_missing(tmp_path: Path) -> None:
    out = io.StringIO()
    print_check(_config(tmp_path), Console(file=out, width=200))
    text = out.getvalue()
    assert "128 prompts x 8 rollouts = 1024" in text
    assert "3 per trace at 40%-80%" in text
    assert "not there yet" in text


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="hidden_size"):
        read_model_size(tmp_path)
