"""bfloat16 with float32 sums, and recomputation that changes no number."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import random
from torch import Tensor

from prefixrl_mcore.checkpoint.save_load import load_checkpoint, save_checkpoint
from prefixrl_mcore.config.policy import OptimizerConfig
from prefixrl_mcore.policy.build import unwrap
from prefixrl_mcore.policy.policy import MegatronPolicy
from tests.support.policies import (
    NO_CLIPPING,
    build_policy,
    count_feed_forward_passes,
    gradients_of,
    make_batch,
    make_sequences,
    max_difference,
)
from tests.support.tiny_models import build_tiny_qwen3_moe, write_model_folder

ROUNDING = 1e-7
"""Of float32 weights of size 0.3 in three steps; a step is 1e-5."""

ORDER_TOLERANCE = 1e-6
"""A recomputed norm gets its two gradients, through it and past it, in another order."""


def master_weights(policy: MegatronPolicy) -> dict[str, Tensor]:
    """Return the float32 weights that the optimizer steps, by Megatron's names; one rank."""
    return {
        name: parameter.main_param.detach().clone().reshape(parameter.shape)
        for name, parameter in policy.model_chunks[0].named_parameters()
    }


@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "distributed"])
def test_bfloat16_weights_follow_float32_master_weights(
    tied_folder: Path, is_sharded: bool
) -> None:
    """AdamW by hand on the master weights, with steps far below bfloat16's resolution."""
    lr, eps = 1e-5, 1e-8
    settings = OptimizerConfig(
        lr=lr, eps=eps, clip_grad=NO_CLIPPING, use_distributed_optimizer=is_sharded
    )
    policy = build_policy(tied_folder, dtype="bfloat16", optimizer=settings)
    batch = make_batch()
    expected = master_weights(policy)
    first = {name: weight.clone() for name, weight in expected.items()}
    assert {weight.dtype for weight in expected.values()} == {torch.float32}
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in expected.items()}
    for step in (1, 2, 3):
        policy.update(batch)
        for name, parameter in policy.model_chunks[0].named_parameters():
            assert parameter.main_grad.dtype == torch.float32
            gradient, (mean, square) = parameter.main_grad, moments[name]
            mean.mul_(0.9).add_(gradient, alpha=0.1)
            square.mul_(0.95).addcmul_(gradient, gradient, value=0.05)
            denominator = (square / (1 - 0.95**step)).sqrt() + eps
            expected[name] -= lr * (mean / (1 - 0.9**step)) / denominator
    got = master_weights(policy)
    assert max_difference(got, expected) < ROUNDING
    assert max_difference(got, first) == pytest.approx(3 * lr, rel=0.01)
    for name, parameter in policy.model_chunks[0].named_parameters():
        assert torch.equal(parameter.detach(), got[name].to(torch.bfloat16))
    # A step of 1e-5 is lost in most bfloat16 weights of size 0.02, whose steps are 1.2e-4.
    moved = [not torch.equal(got[n].to(torch.bfloat16), first[n].to(torch.bfloat16)) for n in got]
    assert any(moved)


@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_resumed_bfloat16_run_goes_on_bit_for_bit(
    tied_folder: Path, tmp_path: Path, num_steps: int, is_sharded: bool
) -> None:
    """The bits of the main weights that bfloat16 has no room for are in the checkpoint."""
    optimizer = OptimizerConfig(lr=1e-5, use_distributed_optimizer=is_sharded)
    batch = make_batch()
    policy = build_policy(tied_folder, dtype="bfloat16", optimizer=optimizer)
    for _ in range(num_steps):
        policy.update(batch)
    save_checkpoint(tmp_path, num_steps, policy, {})
    resumed = build_policy(tied_folder, dtype="bfloat16", optimizer=optimizer)
    load_checkpoint(tmp_path, resumed)
    assert max_difference(master_weights(resumed), master_weights(policy)) == 0.0
    ours, theirs = policy.update(batch), resumed.update(batch)
    assert (ours.loss, ours.gradient_norm) == (theirs.loss, theirs.gradient_norm)
    assert max_difference(master_weights(resumed), master_weights(policy)) == 0.0
    rounded = {n: w - w.to(torch.bfloat16).float() for n, w in master_weights(policy).items()}
    assert max(float(rest.abs().max()) for rest in rounded.values()) > 1e-6


def test_gradients_of_many_microbatches_are_summed_in_float32(tied_folder: Path) -> None:
    """64 copies of a sequence, each a microbatch, have the gradient of one.

    In bfloat16 a sum stops growing when a summand is below 2^-9 of it.
    """
    (sequence,) = make_sequences(1, seed=1)
    length = len(sequence.context_token_ids) + len(sequence.completion_token_ids)
    outcomes = []
    for num_copies in (1, 64):
        copies = [
            replace(sequence, sequence_id=f"copy-{index}", group_index=index)
            for index in range(num_copies)
        ]
        policy = build_policy(tied_folder, dtype="bfloat16", stream_tokens=length)
        batch = make_batch(copies, stream_tokens=length)
        assert len(batch.streams) == num_copies
        policy.update(batch)
        outcomes.append(gradients_of_float32(policy))
    one, many = outcomes
    assert {gradient.dtype for gradient in many.values()} == {torch.float32}
    for name, gradient in one.items():
        torch.testing.assert_close(many[name], gradient, rtol=1e-5, atol=1e-8)


def gradients_of_float32(policy: MegatronPolicy) -> dict[str, Tensor]:
    return {name: p.main_grad.clone() for name, p in policy.model_chunks[0].named_parameters()}


def recomputed_by(policy: MegatronPolicy) -> set[str]:
    """Return what Megatron's first layer says that it recomputes."""
    layer = unwrap(policy.model_chunks[0]).decoder.layers[0]
    says = {
        "core_attn": layer.self_attention.checkpoint_core_attention,
        "mlp": layer.recompute_mlp,
        "layernorm": layer.recompute_input_layernorm and layer.recompute_pre_mlp_layernorm,
    }
    return {name for name, is_recomputed in says.items() if is_recomputed}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "modules", [None, ("core_attn",), ("layernorm",), ("core_attn", "mlp", "layernorm")], ids=str
)
def test_selective_recomputation_changes_no_number(
    tied_folder: Path, modules: tuple[str, ...] | None, dtype: str
) -> None:
    batch = make_batch()
    kept = build_policy(tied_folder, dtype=dtype)
    kept.update(batch)
    selective = build_policy(
        tied_folder, dtype=dtype, recompute="selective", recompute_modules=modules
    )
    selective.update(batch)
    assert recomputed_by(selective) == set(modules or ("mlp",))
    expected = gradients_of_float32(kept)
    difference = max_difference(gradients_of_float32(selective), expected)
    assert difference <= (ORDER_TOLERANCE if "layernorm" in (modules or ()) else 0.0)
    assert max(float(g.abs().max()) for g in expected.values()) > 0.05


def test_recomputed_norms_need_no_compiler(
    tied_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise AssertionError("compiles in the backward pass")

    monkeypatch.setattr(random, "load_inline", refuse)
    monkeypatch.setattr(random, "_share_storage_ext", None)
    policy = build_policy(tied_folder, recompute="selective", recompute_modules=("layernorm",))
    assert policy.update(make_batch()).gradient_norm > 0


def test_selective_recomputation_of_a_mixture_changes_no_bit(tmp_path: Path) -> None:
    folder = write_model_folder(build_tiny_qwen3_moe(), tmp_path / "model")
    batch = make_batch()
    outcomes = []
    for settings in ({}, {"recompute": "selective"}, {"recompute": "full"}):
        policy = build_policy(folder, **settings)
        passes = count_feed_forward_passes(policy)
        policy.update(batch)
        outcomes.append(gradients_of(policy))
        assert len(passes) == 2 * len(batch.streams) * (2 if settings else 1)  # of two layers
    for other in outcomes[1:]:
        assert max_difference(other, outcomes[0]) == 0.0
