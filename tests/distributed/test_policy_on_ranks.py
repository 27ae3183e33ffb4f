"""The same update on 1, 2 and 4 ranks, for every layout, over gloo."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prefixrl_mcore.config.policy import OptimizerConfig, ParallelConfig
from prefixrl_mcore.policy import cpu_runtime, topology
from prefixrl_mcore.records import UpdateResult
from tests.support.policies import (
    NO_CLIPPING,
    build_policy,
    gradients_of,
    make_batch,
    max_difference,
    weights_of,
)
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import build_tiny_qwen3, write_model_folder

ROOT = "megatron.core"
CLIP_GRADS = ("clip_grad_by_total_norm_fp32", "get_grad_norm_fp32")
SCHEDULES = (
    "no_pipelining",
    "pipelining_with_interleaving",
    "pipelining_without_interleaving",
)

GRADIENT_TOLERANCE = 2e-6
"""float32: other orders of summation; gradients are up to 0.3 in size."""

ADAM_EPS = 1e-3
"""Large, so that an AdamW step is a smooth function of the gradient: with the usual 1e-8 it is
almost a sign, and rounding decides the sign of a vanishing gradient."""

WEIGHT_TOLERANCE = 1e-5
"""Three steps of at most ``lr * GRADIENT_TOLERANCE / ADAM_EPS = 2e-6`` each, and what the later
gradients make of it."""

STATISTICS_TOLERANCE = 1e-4
"""Logprobs and entropies in nats, after the updates; logits are of size 10."""

KNOWN_REDIRECTIONS = {
    *(f"{ROOT}.optimizer.clip_grads:{name}" for name in CLIP_GRADS),
    f"{ROOT}.models.common.language_module.language_module:"
    "LanguageModule.setup_embeddings_and_output_layer",
    f"{ROOT}.optimizer.distrib_optimizer:DistributedOptimizer.__init__",
    f"{ROOT}.optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups",
    f"{ROOT}.optimizer.optimizer:FP32Optimizer.__init__",
    f"{ROOT}.optimizer.optimizer:MegatronOptimizer.has_grad_norm_group",
    f"{ROOT}.optimizer.optimizer:MixedPrecisionOptimizer.__init__",
    *(f"{ROOT}.pipeline_parallel.schedules:forward_backward_{name}" for name in SCHEDULES),
    f"{ROOT}.utils:local_multi_tensor_l2_norm",
}
"""megatron's functions that ask for CUDA in any of the layouts."""

Outcome = tuple[
    dict[str, Tensor], dict[str, Tensor], list[UpdateResult], list[tuple[Tensor, Tensor]]
]


def _train(
    rank: int, folder: Path, parallel: ParallelConfig, optimizer: OptimizerConfig, recompute: str
) -> Outcome:
    policy = build_policy(folder, parallel=parallel, optimizer=optimizer, recompute=recompute)
    batch = make_batch(
        num_ranks=parallel.data_parallel_size,
        streams_multiple=parallel.pipeline_model_parallel_size,
        sequence_multiple=parallel.sequence_multiple,
    )
    results = [policy.update(batch)]
    gradients = gradients_of(policy)
    results += [policy.update(batch) for _ in range(2)]
    rows = policy.row_statistics(batch)
    by_sequence: dict[int, list[tuple[float, float]]] = {}
    for stream, (logprobs_R, entropies_R) in zip(batch.streams, rows, strict=True):
        for index, logprob, entropy in zip(
            stream.sequence_index_R.tolist(), logprobs_R, entropies_R, strict=True
        ):
            by_sequence.setdefault(index, []).append((float(logprob), float(entropy)))
    statistics = [torch.tensor(by_sequence[index]) for index in range(batch.num_sequences)]
    if rank or parallel.world_size > 1:
        assert cpu_runtime.redirected_functions() <= KNOWN_REDIRECTIONS
    return gradients, weights_of(policy), results, [(s[:, 0], s[:, 1]) for s in statistics]


def _parallel(
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    vpp: int | None = None,
    sp: bool = False,
    cp: int = 1,
) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
        virtual_pipeline_model_parallel_size=vpp,
        sequence_parallel=sp,
        context_parallel_size=cp,
    )


def _optimizer(distributed: bool = False) -> OptimizerConfig:
    return OptimizerConfig(
        lr=1e-3,
        eps=ADAM_EPS,
        clip_grad=NO_CLIPPING,
        weight_decay=0.1,
        use_distributed_optimizer=distributed,
    )


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, Outcome]]:
    """Model folder and outcome on a single rank, with tied and untied embeddings."""
    outcomes: dict[bool, tuple[Path, Outcome]] = {}
    for is_tied in (True, False):
        # 33 tokens do not divide by two: tensor-parallel ranks see a padded vocabulary.
        model = build_tiny_qwen3(tie_word_embeddings=is_tied, num_layers=4, vocab_size=33)
        folder = write_model_folder(model, tmp_path_factory.mktemp("model"))
        outcomes[is_tied] = folder, _train(0, folder, _parallel(), _optimizer(), "none")
    topology.shut_down()
    return outcomes


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("is_tied", "parallel", "distributed", "recompute"),
    [
        pytest.param(True, _parallel(tp=2), False, "none", id="tied-tp2"),
        pytest.param(True, _parallel(pp=2), False, "none", id="tied-pp2"),
        pytest.param(True, _parallel(dp=2), True, "none", id="tied-dp2-distributed-optimizer"),
        pytest.param(False, _parallel(tp=2, sp=True), False, "full", id="tp2-sp-recompute"),
        pytest.param(True, _parallel(cp=2), False, "none", id="tied-cp2"),
        pytest.param(False, _parallel(cp=2), False, "full", id="cp2-recompute", marks=SLOW),
        pytest.param(False, _parallel(cp=4), False, "none", id="cp4", marks=SLOW),
        pytest.param(False, _parallel(cp=2, tp=2), False, "none", id="cp2-tp2", marks=SLOW),
        pytest.param(
            True, _parallel(cp=2, tp=2, sp=True), False, "none", id="tied-cp2-tp2-sp", marks=SLOW
        ),
        pytest.param(True, _parallel(cp=2, pp=2), False, "none", id="tied-cp2-pp2", marks=SLOW),
        pytest.param(
            False, _parallel(cp=2, pp=2, vpp=2), False, "none", id="cp2-pp2-vpp2", marks=SLOW
        ),
        pytest.param(
            True, _parallel(cp=2, dp=2), True, "none", id="tied-cp2-dp2-distributed", marks=SLOW
        ),
        pytest.param(False, _parallel(tp=2), False, "none", id="tp2", marks=SLOW),
        pytest.param(False, _parallel(pp=2), False, "none", id="pp2", marks=SLOW),
        pytest.param(False, _parallel(dp=2), False, "none", id="dp2", marks=SLOW),
        pytest.param(True, _parallel(tp=2, sp=True), False, "none", id="tied-tp2-sp", marks=SLOW),
        pytest.param(True, _parallel(pp=2, vpp=2), False, "none", id="tied-pp2-vpp2", marks=SLOW),
        pytest.param(False, _parallel(pp=2, vpp=2), False, "none", id="pp2-vpp2", marks=SLOW),
        pytest.param(True, _parallel(tp=2, pp=2), False, "none", id="tied-tp2-pp2", marks=SLOW),
        pytest.param(False, _parallel(tp=2, pp=2), False, "full", id="tp2-pp2", marks=SLOW),
        pytest.param(True, _parallel(tp=2, dp=2), True, "none", id="tied-tp2-dp2", marks=SLOW),
    ],
)
def test_every_layout_does_the_same_update(
    one_rank: dict[bool, tuple[Path, Outcome]],
    is_tied: bool,
    parallel: ParallelConfig,
    distributed: bool,
    recompute: str,
) -> None:
    folder, (gradients, weights, results, statistics) = one_rank[is_tied]
    outcomes = run_on_ranks(
        _train,
        folder,
        parallel,
        _optimizer(distributed),
        recompute,
        world_size=parallel.world_size,
    )
    for rank, outcome in enumerate(outcomes):
        its_gradients, its_weights, its_results, its_statistics = outcome
        if not distributed:  # a sharded optimizer leaves each rank a part of the gradient
            assert max_difference(its_gradients, gradients) < GRADIENT_TOLERANCE, rank
        assert max_difference(its_weights, weights) < WEIGHT_TOLERANCE, rank
        for mine, one in zip(its_results, results, strict=True):
            assert mine.loss == pytest.approx(one.loss, abs=1e-5)
            assert mine.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4)
            assert mine.metrics == pytest.approx(one.metrics, abs=1e-4)
        for mine, one in zip(its_statistics, statistics, strict=True):
            assert torch.stack(mine) == pytest.approx(torch.stack(one), abs=STATISTICS_TOLERANCE)
    assert gradients["model.layers.3.mlp.down_proj.weight"].abs().max() > 1e-3


class _NotPicklableError(Exception):
    def __init__(self, *, field: str) -> None:
        super().__init__(f"bad {field}")


def _raise_missing() -> None:
    raise FileNotFoundError("problems.jsonl")


def _raise_not_picklable() -> None:
    raise _NotPicklableError(field="answer")


def _error_of(function: Callable[[], object]) -> str:
    try:
        topology.run_on_first(function)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _talk(rank: int) -> tuple[object, ...]:
    topology.initialize(ParallelConfig(data_parallel_size=2), seed=0)
    return (
        topology.run_on_first(lambda: {"rank": rank}),
        _error_of(_raise_missing),
        _error_of(_raise_not_picklable),
        _error_of(lambda: lambda: None),
        topology.any_rank(rank == 1),
        topology.any_rank(False),
    )


def test_results_errors_and_flags_of_one_rank_reach_every_rank() -> None:
    first, second = run_on_ranks(_talk, world_size=2)
    missing = "FileNotFoundError: problems.jsonl"
    assert first[:3] == ({"rank": 0}, missing, "_NotPicklableError: bad answer")
    assert second[:3] == (
        {"rank": 0},
        missing,
        "RuntimeError: rank 0 raised _NotPicklableError: bad answer",
    )
    for outcome in (first, second):
        assert "pickle" in outcome[3]  # a result that cannot be sent is an error everywhere
        assert outcome[4:] == (True, False)
