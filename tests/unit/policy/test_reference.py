"""The KL term against a frozen reference: values by transformers, and what it leaves alone."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.policy import LossConfig
from prefixrl_mcore.observability.phases import Phase, Phases
from prefixrl_mcore.policy.reference import FrozenReference, power_of_two_parts
from tests.support.policies import (
    build_policy,
    gradients_of,
    hf_row_statistics,
    make_batch,
    max_difference,
    weights_of,
)
from tests.support.reference_runs import kl_loss, reference_logprobs
from tests.support.tiny_models import build_tiny_qwen3, write_model_folder

TOLERANCE = 2e-6
"""float32, other orders of summation; as for the gradients of every layout."""


@pytest.fixture
def reference(hf_model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    return build_tiny_qwen3(seed=1, tie_word_embeddings=hf_model.config.tie_word_embeddings)


@pytest.fixture
def reference_folder(reference: Qwen3ForCausalLM, tmp_path: Path) -> Path:
    return write_model_folder(reference, tmp_path / "reference")


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_loss_gradient_and_metrics_are_those_of_the_definition(
    model_folder: Path,
    hf_model: Qwen3ForCausalLM,
    reference: Qwen3ForCausalLM,
    reference_folder: Path,
    kl: str,
) -> None:
    batch = make_batch()
    policy = build_policy(model_folder, loss=kl_loss(reference_folder, kl))
    result = policy.update(batch)
    gradients = gradients_of(policy)

    hf_model.zero_grad()
    total, gaps = torch.zeros(()), []
    for stream in (stream for stream in batch.streams if stream.num_rows):
        logprobs_R, _ = hf_row_statistics(hf_model, stream)
        with torch.no_grad():
            reference_R, _ = hf_row_statistics(reference, stream)
        gaps_R = logprobs_R - reference_R
        values = {"k1": gaps_R, "k2": gaps_R**2 / 2, "k3": torch.exp(-gaps_R) - 1 + gaps_R}
        total = total - (torch.from_numpy(stream.advantages_R) * logprobs_R).sum()
        total = total + 0.5 * values[kl].sum()
        gaps.append(gaps_R.detach())
    loss = total / batch.num_trained_tokens
    loss.backward()

    assert result.loss == pytest.approx(float(loss), rel=1e-5)
    all_gaps = torch.cat(gaps)
    assert result.metrics["loss/reference_k1_nats"] == pytest.approx(
        float(all_gaps.mean()), abs=1e-5
    )
    k3 = torch.exp(-all_gaps) - 1 + all_gaps
    assert result.metrics["loss/reference_k3_nats"] == pytest.approx(float(k3.mean()), rel=1e-4)
    expected = {name: p.grad for name, p in hf_model.named_parameters() if p.grad is not None}
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert max_difference(gradients, expected) < TOLERANCE * max(1.0, scale)


class SlowReference(Phases):
    """Has a reference that takes longer than whatever else a busy machine may do meanwhile."""

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        with super().phase(name):
            time.sleep(0.5 if name == "reference" else 0.0)
            yield


def test_the_pass_of_the_reference_is_a_phase_of_its_own(model_folder: Path) -> None:
    policy = build_policy(model_folder, loss=LossConfig(kl="k3", kl_coefficient=0.5))
    policy.phases = SlowReference()
    policy.phases.begin_steps()
    result = policy.update(make_batch())
    times = policy.phases.take()
    assert times["time/reference_seconds"] >= 0.5
    # Throughput and MFU are over these seconds, and their FLOPs are without the reference's.
    assert result.forward_backward_seconds == pytest.approx(
        times["time/forward_backward_seconds"], abs=0.2 * times["time/reference_seconds"]
    )


def test_the_reference_is_the_initial_policy_and_stays_it(model_folder: Path) -> None:
    batch = make_batch()
    policy = build_policy(model_folder, loss=LossConfig(kl="k3", kl_coefficient=0.5))
    first = policy.update(batch)
    assert first.metrics["loss/reference_k3_nats"] == pytest.approx(0.0, abs=1e-9)
    assert first.metrics["loss/reference_k1_nats"] == pytest.approx(0.0, abs=1e-6)
    second = policy.update(batch)
    assert second.metrics["loss/reference_k3_nats"] > 1e-6
    fresh = build_policy(model_folder, loss=LossConfig(kl="k3", kl_coefficient=0.5))
    kept, initial = (reference_logprobs(p, batch) for p in (policy, fresh))
    assert kept is not None
    assert initial is not None
    for ours, theirs in zip(kept, initial, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_bfloat16_weights_come_back_bit_for_bit(model_folder: Path, reference_folder: Path) -> None:
    policy = build_policy(model_folder, loss=kl_loss(reference_folder), dtype="bfloat16")
    before = weights_of(policy)
    reference_logprobs(policy, make_batch())
    assert max_difference(before, weights_of(policy)) == 0.0


def test_a_dry_run_with_a_reference_changes_no_bit_of_the_next_update(
    model_folder: Path, reference_folder: Path
) -> None:
    batch, outcomes = make_batch(), []
    for is_dry_run in (False, True):
        policy = build_policy(model_folder, loss=kl_loss(reference_folder), dtype="bfloat16")
        if is_dry_run:
            policy.dry_run(batch)
        result = policy.update(batch)
        outcomes.append((result.loss, result.gradient_norm, gradients_of(policy), policy))
    (loss, norm, gradients, plain), (dry_loss, dry_norm, dry_gradients, dry) = outcomes
    assert (dry_loss, dry_norm) == (loss, norm)
    assert max_difference(gradients, dry_gradients) == 0.0
    assert max_difference(weights_of(plain), weights_of(dry)) == 0.0


def test_weights_are_kept_in_powers_of_two_and_come_back_after_a_failure() -> None:
    assert power_of_two_parts(7 * 2**16 + 3) == [2**18, 2**17, 2**16, 3]
    assert power_of_two_parts(2**16 - 1) == [2**16 - 1]
    assert power_of_two_parts(0) == []
    model = torch.nn.Linear(3 * 2**10, 2**6)  # 3 * 2^16 weights in two parts, and a bias
    reference = FrozenReference([model])
    initial = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.mul_(2)
    trained = model.weight.detach().clone()
    with reference.in_place():
        assert torch.equal(model.weight, initial)
    assert torch.equal(model.weight, trained)
    assert [len(part) for part in reference._weights] == [2**17, 2**16, 2**6]
    reference._weights[-1] = torch.zeros(3)  # stops the way in after the first weight
    with pytest.raises(RuntimeError, match="size"), reference.in_place():
        pass
    assert torch.equal(model.weight, trained)


def test_a_reference_that_computes_something_else_is_refused(
    model_folder: Path, reference_folder: Path
) -> None:
    path = reference_folder / "config.json"
    config = json.loads(path.read_text()) | {"max_position_embeddings": 64}
    path.write_text(json.dumps(config))
    build_policy(model_folder, loss=kl_loss(reference_folder))
    path.write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(ConfigError, match=r"it has layernorm_epsilon 0\.5 \(the policy has .*\);"):
        build_policy(model_folder, loss=kl_loss(reference_folder))


def test_a_reference_that_is_not_finite_is_refused(
    model_folder: Path, reference: Qwen3ForCausalLM, tmp_path: Path
) -> None:
    with torch.no_grad():
        reference.model.norm.weight[0] = float("nan")
    folder = write_model_folder(reference, tmp_path / "nan")
    with pytest.raises(ValueError, match=r"reference of loss\.kl, .* weights are not finite"):
        build_policy(model_folder, loss=kl_loss(folder))


def test_without_a_kl_term_there_is_no_reference(model_folder: Path) -> None:
    policy = build_policy(model_folder)
    assert not any("reference" in name for name in policy.update(make_batch()).metrics)
    with pytest.raises(ValueError, match=r"a loss with a KL term needs the policy to be built"):
        policy.update(make_batch(), loss=LossConfig(kl="k1", kl_coefficient=0.1))


@pytest.mark.parametrize(
    "settings",
    [
        {"kl": "k1"},
        {"kl_coefficient": 0.1},
    ],
)
def test_a_kl_term_and_its_coefficient_go_together(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="do not go together: set both"):
        LossConfig.model_validate(settings)


def test_a_reference_without_a_kl_term_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss\.reference_path = .* is used with loss\.kl only"):
        LossConfig(reference_path=Path("somewhere"))
