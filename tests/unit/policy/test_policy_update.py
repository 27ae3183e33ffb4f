"""Updates that are skipped, refused, scheduled; and starting the optimizer anew."""

import dataclasses
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixrl_mcore.accounting.model_flops import ModelFlops, sequence_work
from prefixrl_mcore.config.policy import LossConfig, OptimizerConfig
from prefixrl_mcore.data.packing import PackedBatch
from prefixrl_mcore.policy.build import build_optimizer
from prefixrl_mcore.policy.policy import MegatronPolicy
from tests.support.policies import (
    NO_CLIPPING,
    build_policy,
    make_batch,
    make_sequences,
    max_difference,
    weights_of,
)


def _with_advantage(value: float) -> PackedBatch:
    sequences = [dataclasses.replace(s, advantage=value) for s in make_sequences()]
    return make_batch(sequences)


def _state(policy: MegatronPolicy) -> tuple[int, int, float]:
    return policy.policy_version, policy.scheduler.num_steps, policy.learning_rate


def test_a_batch_without_gradient_changes_nothing(tied_folder: Path) -> None:
    policy = build_policy(
        tied_folder, optimizer=OptimizerConfig(lr=1e-2, schedule="linear", weight_decay=0.5)
    )
    policy.update(make_batch())  # leaves moments that a step with gradient zero would apply
    weights, state = weights_of(policy), _state(policy)
    result = policy.update(_with_advantage(0.0))
    assert result.was_skipped
    assert result.gradient_norm == 0.0
    assert result.loss == 0.0
    assert result.metrics["loss/entropy_nats"] > 0.5  # the metrics are still computed
    assert max_difference(weights_of(policy), weights) == 0.0
    assert _state(policy) == state


def test_zero_advantages_with_an_entropy_bonus_are_a_step(tied_folder: Path) -> None:
    policy = build_policy(tied_folder, loss=LossConfig(entropy_coefficient=0.1))
    result = policy.update(_with_advantage(0.0))
    assert not result.was_skipped
    assert result.gradient_norm > 1e-3
    assert policy.policy_version == 1


def test_an_update_can_have_an_estimator_of_its_own(tied_folder: Path) -> None:
    bonus = LossConfig(entropy_coefficient=0.1)
    batch = make_batch()
    plain = build_policy(tied_folder).update(batch)
    own = build_policy(tied_folder, loss=bonus).update(batch, loss=LossConfig())
    assert own == plain
    assert build_policy(tied_folder, loss=bonus).update(batch).loss < plain.loss


@pytest.mark.parametrize("advantage", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step(
    tied_folder: Path, advantage: float
) -> None:
    policy = build_policy(tied_folder)
    weights = weights_of(policy)
    batch = make_batch()
    stream = batch.streams[0]
    broken = dataclasses.replace(
        stream, advantages_R=torch.full((stream.num_rows,), advantage).numpy()
    )
    with pytest.raises(FloatingPointError, match="policy version 0: loss is"):
        policy.update(dataclasses.replace(batch, streams=(broken, *batch.streams[1:])))
    assert max_difference(weights_of(policy), weights) == 0.0
    assert not policy.update(batch).was_skipped  # and the policy is still usable


def test_a_gradient_that_is_not_finite_stops_before_the_step(tied_folder: Path) -> None:
    policy = build_policy(tied_folder)
    weight = policy.model_chunks[0].module.decoder.final_layernorm.weight
    weights = weights_of(policy)
    handle = weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        policy.update(make_batch())
    handle.remove()
    assert max_difference(weights_of(policy), weights) == 0.0
    assert policy.policy_version == 0


def test_metrics_of_equal_rollout_and_policy_logprobs_are_zero(tied_folder: Path) -> None:
    policy = build_policy(tied_folder)
    batch = make_batch()
    streams = tuple(
        dataclasses.replace(stream, rollout_logprobs_R=logprobs_R)
        for stream, (logprobs_R, _) in zip(batch.streams, policy.row_statistics(batch), strict=True)
    )
    metrics = policy.update(dataclasses.replace(batch, streams=streams)).metrics
    assert metrics["loss/logprob_gap_max_nats"] == 0.0
    assert metrics["loss/k3_nats"] == 0.0
    assert metrics["loss/importance_mean"] == 1.0
    shifted = tuple(
        dataclasses.replace(s, rollout_logprobs_R=s.rollout_logprobs_R + 0.5) for s in streams
    )
    fresh = build_policy(tied_folder)
    metrics = fresh.update(dataclasses.replace(batch, streams=shifted)).metrics
    assert metrics["loss/logprob_gap_mean_nats"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["loss/k1_nats"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        pytest.param("constant", [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0], id="constant"),
        pytest.param("linear", [1 / 3, 2 / 3, 1.0, 0.775, 0.55, 0.325], id="linear"),
        pytest.param(
            "cosine",
            [1 / 3, 2 / 3] + [0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)],
            id="cosine",
        ),
    ],
)
def test_learning_rates_of_a_run_with_two_warmup_steps(
    tied_folder: Path, schedule: str, expected: list[float]
) -> None:
    optimizer = OptimizerConfig.model_validate(
        {"lr": 1e-3, "min_lr": 1e-4, "schedule": schedule, "num_warmup_steps": 2}
    )
    policy = build_policy(tied_folder, optimizer=optimizer, num_steps=6)
    batch = make_batch(make_sequences(2))
    rates = [policy.update(batch).learning_rate for _ in range(6)]
    assert rates == pytest.approx([1e-3 * rate for rate in expected])


@pytest.mark.parametrize(
    ("shape", "shares"),
    [
        # Of the way from min_lr back to the peak, 1/3 and 2/3 through a decay of three steps.
        pytest.param("linear", [2 / 3, 1 / 3], id="linear"),
        pytest.param("cosine", [0.75, 0.25], id="cosine"),
        pytest.param("exponential", [0.5874010520, 0.2599210499], id="exponential"),
        pytest.param("minus_sqrt", [0.4226497308, 0.1835034191], id="minus_sqrt"),
    ],
)
def test_learning_rates_of_warmup_stable_decay(
    tied_folder: Path, shape: str, shares: list[float]
) -> None:
    optimizer = OptimizerConfig.model_validate(
        {
            "lr": 1e-3,
            "min_lr": 1e-4,
            "schedule": "wsd",
            "num_warmup_steps": 2,
            "decay_fraction": 0.5,
            "decay_shape": shape,
        }
    )
    policy = build_policy(tied_folder, optimizer=optimizer, num_steps=6)
    batch = make_batch(make_sequences(2))
    rates = [policy.update(batch).learning_rate for _ in range(6)]
    # Warm-up at steps 1 and 2, the peak at 3 and 4, the decay from there to step 7, not taken.
    expected = [1 / 3, 2 / 3, 1.0, 1.0, *(0.1 + 0.9 * share for share in shares)]
    assert rates == pytest.approx([1e-3 * rate for rate in expected])
    assert policy.learning_rate == pytest.approx(1e-4)


def test_a_decay_that_does_not_fit_behind_the_warmup_is_refused(tied_folder: Path) -> None:
    optimizer = OptimizerConfig(schedule="wsd", num_warmup_steps=8, decay_fraction=0.3)
    with pytest.raises(ValueError, match=r"8 \+ decay_fraction 0\.3 of 10 steps = 3"):
        build_policy(tied_folder, optimizer=optimizer, num_steps=10)


def test_weight_decay_acts_at_the_first_step_and_on_matrices_only(tied_folder: Path) -> None:
    def first_step(weight_decay: float) -> dict[str, torch.Tensor]:
        policy = build_policy(
            tied_folder,
            optimizer=OptimizerConfig(lr=1e-2, weight_decay=weight_decay, clip_grad=NO_CLIPPING),
        )
        before = weights_of(policy)
        policy.update(make_batch())
        return {name: tensor - before[name] for name, tensor in weights_of(policy).items()}

    policy_weights = weights_of(build_policy(tied_folder))
    without, with_decay = first_step(0.0), first_step(0.5)
    for name, weight in policy_weights.items():
        factor = 0.0 if weight.dim() == 1 else -1e-2 * 0.5
        torch.testing.assert_close(
            with_decay[name] - without[name], factor * weight, atol=1e-6, rtol=0
        )


def test_reset_optimizer_forgets_moments_and_schedule_but_not_the_weights(
    tied_folder: Path,
) -> None:
    settings = OptimizerConfig(lr=1e-3, schedule="linear", clip_grad=NO_CLIPPING)
    batch = make_batch()
    policy = build_policy(tied_folder, optimizer=settings)
    policy.update(batch)
    policy.update(batch)
    weights = weights_of(policy)
    policy.reset_optimizer(2e-3, num_steps=4)
    assert (policy.policy_version, policy.scheduler.num_steps) == (2, 0)
    assert max_difference(weights_of(policy), weights) == 0.0
    result = policy.update(batch)
    assert result.learning_rate == pytest.approx(2e-3)
    # The first step of AdamW with empty moments is the sign of the gradient, of size lr.
    change = weights_of(policy)["model.embed_tokens.weight"] - weights["model.embed_tokens.weight"]
    assert change.abs().max().item() == pytest.approx(2e-3, rel=1e-3)
    rates = [policy.update(batch).learning_rate for _ in range(3)]
    assert rates == pytest.approx([1.5e-3, 1e-3, 0.5e-3])  # linear, over the four steps given


@pytest.mark.parametrize("is_sharded", [False, True])
def test_the_old_optimizer_is_gone_before_the_new_one_is_built(
    tied_folder: Path, monkeypatch: pytest.MonkeyPatch, is_sharded: bool
) -> None:
    settings = OptimizerConfig(lr=1e-3, use_distributed_optimizer=is_sharded)
    policy = build_policy(tied_folder, optimizer=settings, dtype="bfloat16")
    policy.update(make_batch())
    parts = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    old = [weakref.ref(policy.optimizer), *(weakref.ref(part) for part in parts)]
    old += [
        weakref.ref(moment)
        for part in parts
        for state in part.optimizer.state.values()
        for moment in state.values()
        if isinstance(moment, torch.Tensor)
    ]
    assert len(old) > 10
    alive: list[int] = []

    def build(*arguments: Any, **settings: Any) -> object:
        alive.append(sum(reference() is not None for reference in old))
        return build_optimizer(*arguments, **settings)

    monkeypatch.setattr("prefixrl_mcore.policy.policy.build_optimizer", build)
    del parts
    policy.reset_optimizer(1e-3, num_steps=1)
    assert alive == [0]


def test_a_batch_for_another_layout_is_refused(tied_folder: Path) -> None:
    policy = build_policy(tied_folder)
    with pytest.raises(ValueError, match="packed for 2 data-parallel"):
        policy.update(make_batch(num_ranks=2))
    with pytest.raises(ValueError, match=r"streams of \[64\] tokens, the policy was built for 96"):
        policy.row_statistics(make_batch(stream_tokens=64))


def test_an_update_tells_of_its_flops_and_a_skipped_one_of_its_forward_pass(
    tied_folder: Path,
) -> None:
    policy = build_policy(tied_folder)
    batch = make_batch()
    result, skipped = policy.update(batch), policy.update(_with_advantage(0.0))
    # The padding is cut off on one rank, so that what is computed is what was given.
    works = [
        sequence_work(
            len(s.context_token_ids + s.completion_token_ids), len(s.completion_token_ids)
        )
        for s in make_sequences()
    ]
    flops = sum(ModelFlops.of(policy.shape).forward(work) for work in works)
    assert result.model_flops == pytest.approx(3 * flops)
    assert skipped.model_flops == pytest.approx(flops)
    assert result.num_computed_tokens == sum(work.num_tokens for work in works)
    assert 0 < result.compute_seconds <= result.forward_backward_seconds
    assert result.optimizer_seconds > 0
    assert skipped.optimizer_seconds == 0
    assert 0 < skipped.compute_seconds <= skipped.forward_backward_seconds
