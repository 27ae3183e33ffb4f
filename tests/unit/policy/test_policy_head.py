"""The policy's head: the same update whatever implements it, and however little memory it has."""

from pathlib import Path

import pytest
import torch
from prefixrl_kernels import HeadShape, plan_head

from prefixrl_mcore.config.policy import HeadConfig, LossConfig
from tests.support.policies import (
    VOCAB_SIZE,
    build_policy,
    gradients_of,
    make_batch,
    make_sequences,
    max_difference,
)

FLOAT32 = 2e-6
"""Another order of summation in float32; gradients are of size 1."""

LONG_STREAM = 4096
"""Tokens of a stream with more rows than the head takes at once when memory is short."""


def _loss() -> LossConfig:
    return LossConfig(importance="truncated", entropy_coefficient=0.05)


def test_triton_and_torch_rows_give_the_same_update(tied_folder: Path) -> None:
    batch = make_batch()
    results, gradients = [], []
    for backend in ("torch", "triton"):
        policy = build_policy(tied_folder, loss=_loss(), head=HeadConfig(backend=backend))
        results.append(policy.update(batch))
        gradients.append(gradients_of(policy))
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    assert results[0].gradient_norm == pytest.approx(results[1].gradient_norm, rel=1e-5)
    assert results[0].metrics == pytest.approx(results[1].metrics, rel=1e-4, abs=1e-6)
    assert results[0].metrics["loss/logprob_gap_mean_nats"] > 0.01
    assert max_difference(gradients[0], gradients[1]) < FLOAT32
    assert max(float(gradient.abs().max()) for gradient in gradients[0].values()) > 0.01


def test_memory_decides_the_mode_and_nothing_else(tied_folder: Path) -> None:
    batch = make_batch(make_sequences(160), stream_tokens=LONG_STREAM)
    (stream,) = batch.streams
    policy = build_policy(tied_folder, loss=_loss(), stream_tokens=LONG_STREAM)
    policy.update(batch)
    expected = gradients_of(policy)
    shape = HeadShape(
        num_rows=len(stream.rows_R),
        num_columns=64,  # 32 tokens, aligned
        hidden_size=policy.shape.hidden_size,
        operand_bytes=4,
        logit_bytes=4,
    )
    assert shape.num_columns >= VOCAB_SIZE
    assert shape.num_rows > 1024
    whole = plan_head(shape, mode="save_dlogits")
    modes = []
    for memory_gb in (1.5, (whole.peak_bytes - 1) / 1e9):
        plan = plan_head(
            shape,
            memory_budget_bytes=round(memory_gb * 1e9),
            has_private_weight_grad=False,
            is_weight_grad_summed=False,
        )
        modes.append(plan.mode)
        policy = build_policy(
            tied_folder,
            loss=_loss(),
            stream_tokens=LONG_STREAM,
            head=HeadConfig(memory_gb=memory_gb),
        )
        policy.update(batch)
        assert max_difference(gradients_of(policy), expected) < FLOAT32, plan.describe()
    assert modes == ["save_dlogits", "grad_in_forward"]


def test_the_weight_of_the_head_is_not_rounded_on_its_way_to_the_gradient_buffer(
    untied_folder: Path,
) -> None:
    """In bfloat16 the gradient of the output layer has more digits than bfloat16 has."""
    policy = build_policy(untied_folder, dtype="bfloat16")
    policy.update(make_batch())
    gradient = gradients_in_main_grad(policy)
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())


def gradients_in_main_grad(policy: object) -> torch.Tensor:
    """Return the output layer's gradient buffer."""
    (chunk,) = policy.model_chunks  # pyright: ignore[reportAttributeAccessIssue]
    weights = dict(chunk.named_parameters())
    (name,) = [name for name in weights if name.endswith("output_layer.weight")]
    return weights[name].main_grad
