"""Hugging Face -> checkpoint -> live model in a layout -> stream, and checkpoint -> Hugging Face.

Every step keeps every bit, so the stream that an engine gets is the folder that is written.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf, convert_to_hf
from prefixrl_mcore.checkpoint.save_load import load_checkpoint, save_checkpoint
from prefixrl_mcore.config.policy import ParallelConfig
from tests.support.layouts import parallel_config
from tests.support.policies import build_policy, weights_of
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import build_tiny_families, randomize, write_model_folder
from tests.support.weights import assert_same_bits, weights_in

TP2 = parallel_config(tp=2)
PP2_VPP2 = parallel_config(pp=2, vpp=2)
TP2_PP2 = parallel_config(tp=2, pp=2)
EP2 = parallel_config(ep=2, dp=2)
UNEVEN = ParallelConfig(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=1)


def through(
    rank: int, checkpoint: Path, other: Path, parallel: ParallelConfig, dtype: str, out: Path
) -> dict[str, Tensor]:
    """Load a converted checkpoint in a layout, save it, and return what is streamed."""
    policy = build_policy(other, parallel=parallel, dtype=dtype)
    load_checkpoint(checkpoint, policy)
    save_checkpoint(out, 1, policy, {})
    return weights_of(policy)


@pytest.mark.parametrize(
    ("family", "dtype", "parallel"),
    [
        pytest.param(family, dtype, parallel, id=f"{family} {dtype} {name}")
        for family, dtype, name, parallel in (
            ("qwen3-tied", "bfloat16", "tp2", TP2),
            ("qwen3", "float32", "tp2-pp2", TP2_PP2),
            ("qwen3-tied", "float32", "pp2-vpp2", PP2_VPP2),
            ("qwen3-tied", "bfloat16", "pp2-(1+3)", UNEVEN),
            ("qwen3-moe", "float32", "ep2-dp2", EP2),
            ("qwen3-moe", "bfloat16", "ep2-pp2-dp2", parallel_config(ep=2, dp=2, pp=2)),
            ("llama-3", "bfloat16", "tp2", TP2),
            ("llama-3", "float32", "pp2-vpp2", PP2_VPP2),
            ("llama-3", "bfloat16", "tp2-pp2", TP2_PP2),
            ("qwen2.5-tied", "bfloat16", "tp2", TP2),
            ("qwen2.5-tied", "float32", "tp2-pp2", TP2_PP2),
            ("qwen2.5-tied", "float32", "pp2-vpp2", PP2_VPP2),
        )
    ],
)
def test_folder_checkpoint_live_model_and_stream_have_the_same_bits(
    tmp_path: Path, family: str, dtype: str, parallel: ParallelConfig
) -> None:
    model = build_tiny_families()[family].to(getattr(torch, dtype))
    source = write_model_folder(model, tmp_path / "source")
    other = write_model_folder(
        randomize(build_tiny_families()[family], 9).to(getattr(torch, dtype)), tmp_path / "other"
    )
    truth = weights_in(source)
    assert ("lm_head.weight" in truth) == (not family.endswith("-tied"))
    assert truth["model.embed_tokens.weight"].shape[0] == 33  # padded to 34 on two ranks
    convert_from_hf(source, tmp_path / "checkpoint")

    streams = run_on_ranks(
        through,
        tmp_path / "checkpoint",
        other,
        parallel,
        dtype,
        tmp_path / "run",
        world_size=parallel.world_size,
    )

    for stream in streams:
        assert_same_bits(stream, truth)
    convert_to_hf(tmp_path / "run", tmp_path / "out")
    assert_same_bits(weights_in(tmp_path / "out"), truth)


def test_float16_is_kept_between_files_and_widened_without_loss_in_a_model(tmp_path: Path) -> None:
    source = write_model_folder(build_tiny_families()["qwen3-tied"].half(), tmp_path / "source")
    other = write_model_folder(
        randomize(build_tiny_families()["qwen3-tied"], 9), tmp_path / "other"
    )
    truth = weights_in(source)
    assert {tensor.dtype for tensor in truth.values()} == {torch.float16}
    convert_from_hf(source, tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same_bits(weights_in(tmp_path / "back"), truth)

    streams = run_on_ranks(
        through,
        *(tmp_path / "checkpoint", other, TP2, "float32", tmp_path / "run"),
        world_size=2,
    )

    wide = {name: tensor.float() for name, tensor in truth.items()}
    for stream in streams:
        assert_same_bits(stream, wide)
    convert_to_hf(tmp_path / "run", tmp_path / "out")
    assert_same_bits(weights_in(tmp_path / "out"), wide)
