"""Losses and metrics of the experts' load: padding does not count, gradients are autograd's."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import PreTrainedModel

from prefixrl_mcore.config.experts import ExpertsConfig
from prefixrl_mcore.data.packing import PackedBatch
from prefixrl_mcore.policy.microbatch import count_real_tokens, is_padding
from prefixrl_mcore.policy.router import BalancedRouter
from tests.support.policies import (
    build_policy,
    by_expert,
    gradients_of,
    hf_loss,
    make_batch,
    make_sequences,
    max_difference,
)
from tests.support.tiny_models import build_tiny_qwen3_moe, write_model_folder

AUX, Z = 0.5, 0.01
"""Large, so that they are a visible part of the gradient."""

TOLERANCE = 3e-6
"""float32 gradients of up to 1: other orders of summation."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build_tiny_qwen3_moe()


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(model, tmp_path_factory.mktemp("model"))


def router_logits(model: PreTrainedModel, batch: PackedBatch) -> list[list[Tensor]]:
    """Return [real tokens, experts] of each layer, for each stream that has a sequence."""
    by_stream: list[list[Tensor]] = []
    for stream in batch.streams:
        layers: list[list[Tensor]] = [[] for _ in model.model.layers]
        handles = [
            layer.mlp.gate.register_forward_pre_hook(
                lambda gate, args, found=found: found.append(
                    F.linear(args[0].reshape(-1, 64), gate.weight)
                )
            )
            for layer, found in zip(model.model.layers, layers, strict=True)
        ]
        for first, last in itertools.pairwise(stream.sequence_starts.tolist()):
            rows = stream.rows_R[(stream.rows_R >= first) & (stream.rows_R < last)]
            if len(rows):
                model(torch.from_numpy(stream.token_ids_T[None, first : int(rows[-1]) + 2]))
        for handle in handles:
            handle.remove()
        if layers[0]:
            by_stream.append([torch.cat(found) for found in layers])
    return by_stream


def chosen_of(logits_TE: Tensor) -> Tensor:
    top = logits_TE.topk(2, dim=-1).indices
    return torch.zeros_like(logits_TE).scatter(1, top, 1.0)


def true_losses(model: PreTrainedModel, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Return balance and z-loss: sums over layers, means over real tokens."""
    by_stream = router_logits(model, batch)
    num_tokens = sum(len(layers[0]) for layers in by_stream)
    balance, z = torch.zeros(()), torch.zeros(())
    for layers in by_stream:
        for logits_TE in layers:
            share_E = chosen_of(logits_TE).mean(0) / 2
            mean_E = torch.softmax(logits_TE, -1).mean(0)
            balance = balance + 4 * (share_E * mean_E).sum() * len(logits_TE) / num_tokens
            z = z + torch.logsumexp(logits_TE, -1).square().sum() / num_tokens
    return balance, z


def hf_gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return by_expert({name: grad.detach().clone() for name, grad in found.items()})


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradient_is_that_of_the_policy_loss_and_both_router_losses(
    model: PreTrainedModel, folder: Path, recompute: str
) -> None:
    batch = make_batch(streams_multiple=2, sequence_multiple=4)
    balance, z = true_losses(model, batch)
    expected = hf_gradients(model, hf_loss(model, batch) + AUX * balance + Z * z)
    experts = ExpertsConfig(aux_loss_coefficient=AUX, z_loss_coefficient=Z)
    policy = build_policy(folder, experts=experts, recompute=recompute)
    result = policy.update(batch)
    assert max_difference(gradients_of(policy), expected) < TOLERANCE
    assert result.metrics["experts/balance_loss"] == pytest.approx(balance.item() / 2, rel=1e-5)
    plain = build_policy(folder)
    plain.update(batch)
    assert max_difference(gradients_of(plain), expected) > 0.01


def test_loads_are_those_of_real_tokens(model: PreTrainedModel, folder: Path) -> None:
    batch = make_batch(streams_multiple=2, sequence_multiple=4)
    assert batch.num_trained_tokens < count_real_tokens(batch.streams)
    counts_LE = torch.stack(
        [
            torch.stack([chosen_of(layer).sum(0) for layer in layers])
            for layers in router_logits(model, batch)
        ]
    ).sum(0)
    ratios = counts_LE.amax(1) / counts_LE.mean(1)
    metrics = build_policy(folder).update(batch).metrics
    assert metrics["experts/load_ratio_max"] == pytest.approx(ratios.max().item())
    assert metrics["experts/load_ratio_mean"] == pytest.approx(ratios.mean().item())
    assert metrics["experts/idle_fraction"] == 0.0
    assert "experts/balance_loss" not in metrics


def test_without_advantages_the_losses_of_the_routers_still_step(
    model: PreTrainedModel, folder: Path
) -> None:
    batch = make_batch([replace(sequence, advantage=0.0) for sequence in make_sequences()])
    balance, z = true_losses(model, batch)
    expected = hf_gradients(model, AUX * balance + Z * z + 0.0 * hf_loss(model, batch))
    experts = ExpertsConfig(aux_loss_coefficient=AUX, z_loss_coefficient=Z)
    policy = build_policy(folder, experts=experts)
    assert not policy.update(batch).was_skipped
    assert policy.policy_version == 1
    assert max_difference(gradients_of(policy), expected) < TOLERANCE
    plain = build_policy(folder)
    assert plain.update(batch).was_skipped
    assert plain.policy_version == 0


@pytest.mark.parametrize("pass_name", ["dry_run", "find_nonfinite"])
def test_every_pass_counts_on_the_device_of_the_weights(folder: Path, pass_name: str) -> None:
    experts = ExpertsConfig(aux_loss_coefficient=AUX, aux_loss_type="global_aux_loss")
    policy = build_policy(folder, experts=experts)
    routers = [m for m in policy.model_chunks[0].modules() if isinstance(m, BalancedRouter)]
    for router in routers:  # as where Megatron made them, before the model went to a GPU
        elsewhere = torch.zeros(4, dtype=torch.float64, device="meta")
        router.tokens_per_expert_E, router._group_tokens_E = elsewhere, elsewhere.clone()
        router.summed_balance_loss = elsewhere.sum()
    getattr(policy, pass_name)(make_batch(make_sequences(2)))
    assert all(router.tokens_per_expert_E.sum() > 0 for router in routers)


def test_the_global_loss_of_one_stream_is_that_of_the_stream(folder: Path) -> None:
    batch = make_batch(stream_tokens=512)
    assert len(batch.streams) == 1
    gradients = []
    for kind in ("aux_loss", "global_aux_loss"):
        experts = ExpertsConfig.model_validate({"aux_loss_coefficient": AUX, "aux_loss_type": kind})
        policy = build_policy(folder, experts=experts, stream_tokens=512)
        policy.update(batch)
        policy.update(batch)  # counts of the update before are forgotten
        gradients.append(gradients_of(policy))
    assert max_difference(*gradients) < TOLERANCE


def test_the_global_loss_balances_over_the_streams_so_far(folder: Path) -> None:
    batch = make_batch()
    losses = {}
    for kind in ("aux_loss", "global_aux_loss"):
        experts = ExpertsConfig.model_validate({"aux_loss_coefficient": AUX, "aux_loss_type": kind})
        result = build_policy(folder, experts=experts).update(batch)
        losses[kind] = result.metrics["experts/balance_loss"]
    # Shares over more tokens are more even.
    assert 1.0 < losses["global_aux_loss"] < losses["aux_loss"]


def test_what_lies_behind_the_last_token_of_a_sequence_is_padding() -> None:
    sequences = make_sequences(3, group_size=1)
    batch = make_batch(sequences, stream_tokens=96, sequence_multiple=8)
    lengths = [len(s.context_token_ids) + len(s.completion_token_ids) for s in sequences]
    assert count_real_tokens(batch.streams) == sum(lengths)
    (stream,) = batch.streams
    runs = [len(list(run)) for real, run in itertools.groupby(~is_padding(stream)) if real]
    assert sorted(runs) == sorted(lengths)
    assert len(np.asarray(is_padding(stream))) == 96
