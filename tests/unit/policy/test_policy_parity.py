"""The Megatron policy computes what transformers computes from the same weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from prefixrl_mcore.config.policy import LossConfig, OptimizerConfig
from tests.support.policies import (
    build_policy,
    gradients_of,
    hf_loss,
    hf_row_statistics,
    make_batch,
    max_difference,
    weights_of,
)

LOGPROB_TOLERANCE = 1e-5
"""float32; logits are of size 10 at this temperature, so 1e-6 relative."""

GRADIENT_TOLERANCE = 2e-6
"""float32; the gradients' largest entries are of size 0.1 to 1."""


def test_logprobs_and_entropies_equal_transformers(
    model_folder: Path, hf_model: Qwen3ForCausalLM
) -> None:
    batch = make_batch()
    rows = build_policy(model_folder).row_statistics(batch)
    assert len(batch.streams) >= 3
    for stream, (logprobs_R, entropies_R) in zip(batch.streams, rows, strict=True):
        assert len(stream.sequence_starts) > 3  # several sequences in each stream
        with torch.no_grad():
            their_logprobs_R, their_entropies_R = hf_row_statistics(hf_model, stream)
        assert logprobs_R.dtype == entropies_R.dtype == np.float32
        assert logprobs_R == pytest.approx(their_logprobs_R.numpy(), abs=LOGPROB_TOLERANCE)
        assert entropies_R == pytest.approx(their_entropies_R.numpy(), abs=LOGPROB_TOLERANCE)
        assert logprobs_R.std() > 0.5  # far from uniform


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.3])
def test_every_gradient_equals_transformers(
    model_folder: Path, hf_model: Qwen3ForCausalLM, entropy_coefficient: float, recompute: str
) -> None:
    batch = make_batch()
    loss = LossConfig(entropy_coefficient=entropy_coefficient)
    policy = build_policy(model_folder, loss=loss, recompute=recompute)
    result = policy.update(batch)

    expected = hf_loss(hf_model, batch, entropy_coefficient=entropy_coefficient)
    expected.backward()
    theirs = {name: p.grad for name, p in hf_model.named_parameters() if p.grad is not None}
    norm = torch.stack([grad.norm() for grad in theirs.values()]).norm()
    assert max_difference(gradients_of(policy), theirs) < GRADIENT_TOLERANCE
    assert result.loss == pytest.approx(expected.item(), abs=1e-5)
    assert result.gradient_norm == pytest.approx(norm.item(), rel=1e-5)
    assert result.num_trained_tokens == batch.num_trained_tokens


def test_three_updates_equal_adamw_on_the_transformers_model(
    model_folder: Path, hf_model: Qwen3ForCausalLM
) -> None:
    # A large eps makes the step a smooth function of the gradient; with 1e-8 it is almost a sign,
    # and rounding would decide the sign of vanishing gradients.
    settings = OptimizerConfig(lr=1e-3, eps=1e-3, weight_decay=0.1, clip_grad=0.5)
    batch = make_batch()
    policy = build_policy(model_folder, optimizer=settings)
    matrices = [p for p in hf_model.parameters() if p.dim() > 1]
    vectors = [p for p in hf_model.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    before = {name: p.detach().clone() for name, p in hf_model.named_parameters()}
    for _ in range(3):
        result = policy.update(batch)
        adamw.zero_grad()
        hf_loss(hf_model, batch).backward()
        norm = torch.nn.utils.clip_grad_norm_(hf_model.parameters(), settings.clip_grad)
        adamw.step()
        assert result.gradient_norm == pytest.approx(float(norm), rel=1e-4)
        assert result.gradient_norm > settings.clip_grad  # clipping was at work
    theirs = {name: p.detach() for name, p in hf_model.named_parameters()}
    assert max_difference(weights_of(policy), theirs) < 5e-6
    assert max_difference(theirs, before) > 1e-3
    assert policy.policy_version == 3


def test_bfloat16_policy_is_close_to_the_float32_one(tied_folder: Path) -> None:
    batch = make_batch()
    exact, rounded = build_policy(tied_folder), build_policy(tied_folder, dtype="bfloat16")
    one, other = exact.update(batch), rounded.update(batch)
    assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=0.05)
    assert other.metrics["loss/entropy_nats"] == pytest.approx(
        one.metrics["loss/entropy_nats"], rel=0.02
    )
    # The main gradients are float32, and the float32 master weights are stepped from them.
    parameters = list(rounded.model_chunks[0].parameters())
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    assert {p.main_grad.dtype for p in parameters} == {torch.float32}


def test_the_first_bfloat16_step_starts_from_the_loaded_weights(tied_folder: Path) -> None:
    # The optimizer's float32 copy is made before the weights are loaded; stepping from it would
    # replace the model by a random one.
    policy = build_policy(
        tied_folder, dtype="bfloat16", optimizer=OptimizerConfig(lr=1e-9, clip_grad=1.0)
    )
    before = weights_of(policy)
    assert not policy.update(make_batch()).was_skipped
    assert max_difference(weights_of(policy), before) == 0.0
