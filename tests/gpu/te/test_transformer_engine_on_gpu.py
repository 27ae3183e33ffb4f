"""Transformer Engine's layers against Megatron's local ones, on one CUDA device.

Run by ``make gpu`` in an environment that has Transformer Engine; without it nothing here is run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prefixrl_mcore.checkpoint.save_load import load_checkpoint, save_checkpoint
from prefixrl_mcore.config.policy import OptimizerConfig
from prefixrl_mcore.policy import topology
from prefixrl_mcore.policy.layers import describe_machine
from prefixrl_mcore.policy.policy import MegatronPolicy
from tests.support.apart import assert_sequences_are_apart
from tests.support.policies import (
    NO_CLIPPING,
    build_policy,
    gradients_of,
    make_batch,
    max_difference,
    weights_of,
)
from tests.support.tiny_models import build_tiny_qwen3, build_tiny_qwen3_moe, write_model_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        describe_machine().te_version is None or not torch.cuda.is_available(),
        reason="needs Transformer Engine and a CUDA device",
    ),
]

LOCAL, TE = "local", "transformer_engine"
STREAM_TOKENS = 96
"""A multiple of 16, as FP8 wants."""

ERROR_RATIO = 2.0
"""Of the distances of both specs' logprobs in bfloat16 from float32."""

ERROR_FLOOR = 5e-3
"""As much more, relative: a token whose experts are nearly tied may be routed otherwise."""

MIN_COSINE = 0.995
"""Of gradients in bfloat16 by different kernels."""

MIN_FP8_COSINE = 0.95
"""FP8 has three bits of mantissa forward and two backward."""

STEP_TOLERANCE = 2e-3
"""One bfloat16 step of weights of size 0.25."""


@pytest.fixture(scope="module", params=["dense", "mixture"])
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    model = build_tiny_qwen3() if request.param == "dense" else build_tiny_qwen3_moe()
    yield write_model_folder(model, tmp_path_factory.mktemp("te") / "model")
    topology.shut_down()


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield write_model_folder(build_tiny_qwen3(), tmp_path_factory.mktemp("te-dense") / "model")
    topology.shut_down()


def build(folder: Path, spec: str, **settings: Any) -> MegatronPolicy:
    policy = build_policy(folder, dtype="bfloat16", layer_spec=spec, **settings)
    assert policy.layers.spec == spec
    return policy


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor], least: float) -> None:
    """Fail if a gradient points elsewhere."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        one, other = gradient.double().flatten(), theirs[name].double().flatten()
        assert float(one @ other / (one.norm() * other.norm())) > least, name


def logprobs(policy: MegatronPolicy) -> np.ndarray:
    return np.concatenate([rows for rows, _ in policy.row_statistics(make_batch())])


def test_weights_go_in_and_out_bit_for_bit(folder: Path) -> None:
    ours, theirs = (weights_of(build(folder, spec)) for spec in (LOCAL, TE))
    assert max_difference(ours, theirs) == 0.0


@pytest.mark.parametrize("fuses", [False, True], ids=["autograd", "fused"])
def test_logprobs_and_gradients_equal_the_local_layers(folder: Path, fuses: bool) -> None:
    batch = make_batch()
    truth = logprobs(build_policy(folder, dtype="float32", layer_spec=LOCAL))
    outcomes = []
    for spec in (LOCAL, TE):
        settings = {"gradient_accumulation_fusion": fuses} if spec == TE else {}
        policy = build(folder, spec, **settings)
        scores = logprobs(policy)
        norm = policy.update(batch).gradient_norm
        outcomes.append((scores, norm, gradients_of(policy)))
    (ours, our_norm, our_gradients), (theirs, their_norm, their_gradients) = outcomes
    size, our_error, their_error = map(np.linalg.norm, (truth, ours - truth, theirs - truth))
    assert their_error < ERROR_RATIO * our_error + ERROR_FLOOR * size
    assert their_norm == pytest.approx(our_norm, rel=0.05)
    assert_alike(our_gradients, their_gradients, MIN_COSINE)


def test_sequences_are_kept_apart(dense_folder: Path) -> None:
    assert_sequences_are_apart(build(dense_folder, TE), make_batch().streams[0])


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_gives_the_same_gradients(folder: Path, recompute: str) -> None:
    batch = make_batch()
    outcomes = []
    for setting in ("none", recompute):
        policy = build(folder, TE, recompute=setting)
        policy.update(batch)
        outcomes.append(gradients_of(policy))
    assert_alike(*outcomes, MIN_COSINE)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_fp8_trains_and_is_near_bfloat16(dense_folder: Path, recipe: str) -> None:
    if (describe_machine().compute_capability or (0, 0)) < (8, 9):
        pytest.skip("this GPU has no FP8")
    batch = make_batch()
    plain, fp8 = build(dense_folder, TE), build(dense_folder, TE, fp8="hybrid", fp8_recipe=recipe)
    norms = [policy.update(batch).gradient_norm for policy in (plain, fp8)]
    assert norms[1] == pytest.approx(norms[0], rel=0.2)
    if recipe == "tensorwise":  # delayed scales are right only after a few steps
        assert_alike(gradients_of(plain), gradients_of(fp8), MIN_FP8_COSINE)
    losses = [fp8.update(batch).loss for _ in range(5)]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


STATES = {
    "precision-aware": {},
    "bfloat16 moments": {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"},
    "float8 mean": {"exp_avg_dtype": "float8", "main_params_dtype": "float16"},
}


def precision_aware(**types: str) -> OptimizerConfig:
    return OptimizerConfig.model_validate(
        {
            "lr": 1e-3,
            "clip_grad": NO_CLIPPING,
            "use_distributed_optimizer": True,
            "use_precision_aware_optimizer": True,
            **types,
        }
    )


@pytest.mark.parametrize("name", STATES)
def test_other_types_of_state_step_like_float32(dense_folder: Path, name: str) -> None:
    batch = make_batch()
    outcomes = []
    for optimizer in (
        OptimizerConfig(lr=1e-3, clip_grad=NO_CLIPPING, use_distributed_optimizer=True),
        precision_aware(**STATES[name]),
    ):
        policy = build(dense_folder, TE, optimizer=optimizer)
        before = weights_of(policy)
        policy.update(batch)
        outcomes.append({n: w - before[n] for n, w in weights_of(policy).items()})
    assert_alike(*outcomes, 0.98)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_resumed_run_goes_on_exactly(
    dense_folder: Path, tmp_path: Path, name: str, num_steps: int
) -> None:
    batch, optimizer = make_batch(), precision_aware(**STATES[name])
    policy = build(dense_folder, TE, optimizer=optimizer)
    for _ in range(num_steps):
        policy.update(batch)
    save_checkpoint(tmp_path, num_steps, policy, {})
    resumed = build(dense_folder, TE, optimizer=optimizer)
    load_checkpoint(tmp_path, resumed)
    assert max_difference(weights_of(resumed), weights_of(policy)) == 0.0
    policy.update(batch)
    resumed.update(batch)
    assert max_difference(weights_of(resumed), weights_of(policy)) <= STEP_TOLERANCE


@pytest.mark.parametrize(("saved", "loaded"), [(LOCAL, TE), (TE, LOCAL)])
@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "distributed"])
def test_a_checkpoint_of_one_spec_loads_under_the_other(
    folder: Path, tmp_path: Path, saved: str, loaded: str, is_sharded: bool
) -> None:
    optimizer = OptimizerConfig(lr=1e-3, use_distributed_optimizer=is_sharded)
    policy = build(folder, saved, optimizer=optimizer)
    policy.update(make_batch())
    save_checkpoint(tmp_path, 1, policy, {})
    other = build(folder, loaded, optimizer=optimizer)
    load_checkpoint(tmp_path, other)
    assert max_difference(weights_of(other), weights_of(policy)) == 0.0
    assert other.update(make_batch()).gradient_norm == pytest.approx(
        policy.update(make_batch()).gradient_norm, rel=0.05
    )
