"""Megatron's local layers on one CUDA device: flash attention over packed sequences, offloading."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from prefixrl_mcore.checkpoint.save_load import load_checkpoint, save_checkpoint
from prefixrl_mcore.config.policy import OptimizerConfig
from prefixrl_mcore.policy import topology
from prefixrl_mcore.policy.attention import PackedCausalAttention
from prefixrl_mcore.policy.packed import build_packed_stream
from tests.support.apart import assert_sequences_are_apart
from tests.support.policies import (
    NO_CLIPPING,
    build_policy,
    gradients_of,
    make_batch,
    max_difference,
    weights_of,
)
from tests.support.tiny_models import build_tiny_qwen3, write_model_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LOCAL = {"dtype": "bfloat16", "layer_spec": "local"}
HYBRID = OptimizerConfig(
    lr=1e-3,
    clip_grad=NO_CLIPPING,
    use_distributed_optimizer=True,
    use_precision_aware_optimizer=True,
    cpu_offload=True,
)

STEP_TOLERANCE = 2e-3
"""Of bfloat16 weights after three steps of 1e-3: one bfloat16 step at a size of 0.25, where the
last bit of the float32 weight decides."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield write_model_folder(build_tiny_qwen3(), tmp_path_factory.mktemp("gpu") / "model")
    topology.shut_down()


def _stream(lengths: list[int], *, has_padded_layout: bool) -> PackedSeqParams:
    starts = np.concatenate(([0], np.cumsum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return build_packed_stream(
        sequence_starts=starts,
        position_ids_T=positions.cuda(),
        device=torch.device("cuda"),
        has_padded_layout=has_padded_layout,
    )


def _attend(
    lengths: list[int], tensors: tuple[Tensor, ...], *, has_padded_layout: bool
) -> list[Tensor]:
    """Return output and gradients, float32."""
    query, key, value = (tensor.detach().clone().requires_grad_() for tensor in tensors)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=query.size(2) * query.size(3),
        num_attention_heads=query.size(2),
        num_query_groups=key.size(2),
        kv_channels=query.size(3),
        attention_dropout=0.0,
    )
    attention = PackedCausalAttention(config, 1, AttnMaskType.causal, "self")
    packed = _stream(lengths, has_padded_layout=has_padded_layout)
    output = attention(query, key, value, None, packed_seq_params=packed)
    weight = torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output)
    gradients = torch.autograd.grad((output * weight.to(output.dtype)).sum(), (query, key, value))
    return [tensor.float() for tensor in (output, *gradients)]


@pytest.mark.parametrize("num_groups", [8, 2, 1])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("lengths", [[1], [300, 1, 129, 128], [1000] * 3 + [17] * 20], ids=str)
def test_flash_attention_is_as_exact_as_the_padded_layout(
    lengths: list[int], width: int, num_groups: int
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = tuple(
        torch.randn(sum(lengths), 1, heads, width, device="cuda", generator=generator)
        for heads in (8, num_groups, num_groups)
    )
    truth = _attend(lengths, tensors, has_padded_layout=True)
    rounded = tuple(tensor.bfloat16() for tensor in tensors)
    padded = _attend(lengths, rounded, has_padded_layout=True)
    flash = _attend(lengths, rounded, has_padded_layout=False)
    for exact, one, other in zip(truth, padded, flash, strict=True):
        scale = exact.norm() + 1e-6
        assert (other - exact).norm() / scale < 2 * (one - exact).norm() / scale + 1e-3


def test_flash_attention_is_chosen_and_keeps_sequences_apart(folder: Path) -> None:
    policy = build_policy(folder, **LOCAL)
    assert policy.layers.attention == "varlen"
    assert_sequences_are_apart(policy, make_batch().streams[0])


def test_the_padded_layout_keeps_sequences_apart(folder: Path) -> None:
    policy = build_policy(folder, dtype="float32")
    assert policy.layers.attention == "sdpa"
    assert_sequences_are_apart(policy, make_batch().streams[0])


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_is_within_the_order_of_atomic_sums(folder: Path, recompute: str) -> None:
    batch = make_batch()
    outcomes = []
    for setting in ("none", recompute):
        policy = build_policy(folder, recompute=setting, **LOCAL)
        policy.update(batch)
        outcomes.append(gradients_of(policy))
    # Gradients are in bfloat16 here; those of the queries are summed in no fixed order.
    assert max_difference(*outcomes) < 0.01
    assert max(float(gradient.abs().max()) for gradient in outcomes[0].values()) > 0.05


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_offloaded_steps_equal_plain_ones(folder: Path, fraction: float) -> None:
    batch = make_batch()
    outcomes = []
    plain = OptimizerConfig(lr=1e-3, clip_grad=NO_CLIPPING, use_distributed_optimizer=True)
    for optimizer in (plain, HYBRID.model_copy(update={"cpu_offload_fraction": fraction})):
        policy = build_policy(folder, optimizer=optimizer, **LOCAL)
        before = weights_of(policy)
        for _ in range(3):
            policy.update(batch)
        outcomes.append(weights_of(policy))
    assert max_difference(*outcomes) <= STEP_TOLERANCE
    assert max_difference(outcomes[0], before) > 1e-3


@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize(
    "optimizer", [OptimizerConfig(lr=1e-3), HYBRID], ids=["plain", "offloaded"]
)
def test_a_resumed_run_goes_on_exactly(
    folder: Path, tmp_path: Path, optimizer: OptimizerConfig, num_steps: int
) -> None:
    batch = make_batch()
    settings: dict[str, Any] = {**LOCAL, "optimizer": optimizer}
    policy = build_policy(folder, **settings)
    for _ in range(num_steps):
        policy.update(batch)
    save_checkpoint(tmp_path, num_steps, policy, {})
    resumed = build_policy(folder, **settings)
    load_checkpoint(tmp_path, resumed)
    assert max_difference(weights_of(resumed), weights_of(policy)) == 0.0
    policy.update(batch)
    resumed.update(batch)
    assert max_difference(weights_of(resumed), weights_of(policy)) <= STEP_TOLERANCE
