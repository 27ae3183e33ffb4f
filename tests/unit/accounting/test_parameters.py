"""Parameter counts against published models and by hand, on every rank."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.accounting.parameters import (
    count_parameters,
    model_size,
    rank_parameters,
    replicas,
    stage_layers,
)
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import ParallelConfig
from tests.support.shapes import LLAMA_3_8B, QWEN3_4B, QWEN3_30B_A3B
from tests.support.tiny_models import build_tiny_families, write_model_folder


@pytest.mark.parametrize(
    ("shape", "total", "active"),
    [
        pytest.param(QWEN3_4B, 4_022_468_096, 4_022_468_096, id="qwen3-4b"),
        pytest.param(QWEN3_30B_A3B, 30_532_122_624, 3_353_032_704, id="qwen3-30b-a3b"),
        pytest.param(LLAMA_3_8B, 8_030_261_248, 8_030_261_248, id="llama-3-8b"),
    ],
)
def test_parameters_of_published_models(shape: ModelShape, total: int, active: int) -> None:
    size = model_size(shape)
    assert (size.num_parameters, size.num_active_parameters) == (total, active)


@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied", "qwen3-moe", "llama-3", "qwen2.5-tied"])
def test_a_folder_is_charged_for_the_weights_that_a_token_meets(
    tmp_path: Path, family: str
) -> None:
    model = build_tiny_families()[family]
    folder = write_model_folder(model, tmp_path / "model")
    shutil.copyfile(folder / "model.safetensors", folder / "old.safetensors")  # no other model's
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert (experts > 0) == (family == "qwen3-moe")
    if experts:
        assert (model.config.num_experts_per_tok, model.config.num_experts) == (2, 4)
    assert count_parameters(folder) == sum(sizes.values()) - experts + experts * 2 // 4


def test_tied_embeddings_are_on_the_first_and_on_the_last_stage() -> None:
    one = rank_parameters(QWEN3_4B, ParallelConfig(), 0)
    assert one.total == model_size(QWEN3_4B).num_parameters
    two = ParallelConfig(pipeline_model_parallel_size=2)
    stages = [rank_parameters(QWEN3_4B, two, stage) for stage in (0, 1)]
    assert sum(stage.total for stage in stages) == one.total + 151_936 * 2560
    assert stages[1].total - stages[0].total == 2560  # the last norm


def test_tensor_parallel_ranks_share_matrices_and_repeat_norms() -> None:
    one = rank_parameters(QWEN3_4B, ParallelConfig(), 0)
    four = rank_parameters(QWEN3_4B, ParallelConfig(tensor_model_parallel_size=4), 0)
    norms = 36 * (2 * 2560 + 2 * 128) + 2560
    assert 4 * four.total == one.total + 3 * norms


def test_expert_parallel_ranks_share_experts_and_repeat_all_else() -> None:
    layout = ParallelConfig(data_parallel_size=4, expert_model_parallel_size=4)
    rank = rank_parameters(QWEN3_30B_A3B, layout, 0)
    experts = 48 * 128 * 3 * 768 * 2048
    assert rank.experts == experts // 4
    assert rank.shared == 30_532_122_624 - experts
    assert replicas(layout) == (4, 1)


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"pipeline_model_parallel_size": 4}, (9, 9, 9, 9)),
        (
            {"pipeline_model_parallel_size": 4, "num_layers_in_first_pipeline_stage": 6},
            (6, 10, 10, 10),
        ),
        (
            {
                "pipeline_model_parallel_size": 3,
                "num_layers_in_first_pipeline_stage": 11,
                "num_layers_in_last_pipeline_stage": 10,
            },
            (11, 15, 10),
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 17,
                "num_layers_in_last_pipeline_stage": 19,
            },
            (17, 19),
        ),
    ],
)
def test_layers_of_uneven_stages(settings: dict[str, Any], layers: tuple[int, ...]) -> None:
    assert stage_layers(QWEN3_4B, ParallelConfig(**settings)) == layers
