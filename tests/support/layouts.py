"""The same three updates in any layout, and how far its numbers are from one process's.

Used by the tests and by ``parallelism_table``, so that the table shows what the tests check.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefixrl_mcore.config.policy import OptimizerConfig, ParallelConfig
from prefixrl_mcore.data.packing import PackedBatch
from prefixrl_mcore.loss.gap_histogram import RELATIVE_ERROR
from prefixrl_mcore.loss.row_metrics import GAP_P99
from prefixrl_mcore.policy import cpu_runtime
from prefixrl_mcore.policy.policy import MegatronPolicy
from prefixrl_mcore.records import TrainingSequence, UpdateResult
from tests.support.policies import (
    NO_CLIPPING,
    build_policy,
    gradients_of,
    hf_row_statistics,
    make_batch,
    max_difference,
    weights_of,
)
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import write_model_folder

ROOT = "megatron.core"
CLIP_GRADS = ("clip_grad_by_total_norm_fp32", "get_grad_norm_fp32")
SCHEDULES = (
    "no_pipelining",
    "pipelining_with_interleaving",
    "pipelining_without_interleaving",
)

_HAS_GPU = torch.cuda.is_available()

LOGPROB_TOLERANCE = 1e-3 if _HAS_GPU else 1e-5
"""Nats, against transformers on the CPU; float32. cuBLAS adds up in another order."""

GRADIENT_TOLERANCE = 2e-5 if _HAS_GPU else 2e-6
"""float32: other orders of summation; gradients are up to 0.3 in size. cuBLAS takes other kernels
for other sizes (not measured yet)."""

NORM_TOLERANCE = 1e-5
"""Of the gradient norm, relative."""

ADAM_EPS = 1e-3
"""Large, so that an AdamW step is a smooth function of the gradient: with the usual 1e-8 it is
almost a sign, and rounding decides the sign of a vanishing gradient."""

WEIGHT_TOLERANCE = 5 * GRADIENT_TOLERANCE
"""Three steps of at most ``lr * GRADIENT_TOLERANCE / ADAM_EPS`` each, which is as much, and what
the later gradients make of it."""

NUM_STEPS = 3

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one rank saw."""

    gradients: dict[str, Tensor]
    """Of the first update."""

    weights: dict[str, Tensor]
    """After the last update."""

    results: list[UpdateResult]
    """Of every update."""

    statistics_before: list[Tensor]
    """[rows, 2] logprobs and entropies of each sequence before the updates."""

    statistics_after: list[Tensor]
    """The same after them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What a layout is compared with."""

    folder: Path
    """The model."""

    one: Outcome
    """Of a single process."""

    statistics: list[Tensor]
    """[rows, 2] logprobs and entropies of each sequence by transformers, before the updates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Largest difference of any rank from the truth."""

    logprobs: float
    """From transformers, nats."""

    gradients: float
    """From one process."""

    gradient_norm: float
    """From one process, relative, of all updates."""

    weights: float
    """From one process, after three updates."""


def parallel_config(
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    vpp: int | None = None,
    sp: bool = False,
    cp: int = 1,
    ep: int = 1,
    etp: int = 1,
) -> ParallelConfig:
    """Return a layout from the usual abbreviations."""
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
        virtual_pipeline_model_parallel_size=vpp,
        sequence_parallel=sp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )


def parse_layout(name: str) -> ParallelConfig:
    """Return a layout from a name like ``tp2 sp pp2`` or, with layers of stages, ``pp2 (1+3)``."""
    sizes: dict[str, Any] = {}
    stages: list[int] = []
    for word in name.split():
        if word == "sp":
            sizes["sp"] = True
        elif word.startswith("("):
            stages = [int(number) for number in word.strip("()").split("+")]
        else:
            sizes[word[:-1]] = int(word[-1])
    parallel = parallel_config(**sizes)
    uneven: dict[str, int] = {}
    if stages:
        uneven["num_layers_in_first_pipeline_stage"] = stages[0]
    if len(stages) > 2:  # of two stages, the last has the rest
        uneven["num_layers_in_last_pipeline_stage"] = stages[-1]
    return ParallelConfig.model_validate(parallel.model_dump() | uneven)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutCase:
    """A layout that must do the same updates as one process."""

    model: str
    """A key of ``build_tiny_families``."""

    name: str
    """The layout in the usual abbreviations."""

    parallel: ParallelConfig
    """The layout."""

    distributed: bool = False
    """With the distributed optimizer."""

    recompute: str = "none"
    """``policy.recompute``."""

    experts: str | None = None
    """``policy.experts.implementation``."""

    is_slow: bool = True
    """Not among the quick tests."""

    @property
    def label(self) -> str:
        """Return model, layout and settings in one line."""
        parts = [self.model, self.name]
        parts += ["distributed-optimizer"] if self.distributed else []
        parts += [f"recompute-{self.recompute}"] if self.recompute != "none" else []
        parts += [f"{self.experts}-experts"] if self.experts else []
        return "-".join(parts)


def _case(model: str, name: str, **settings: Any) -> LayoutCase:
    """Return a case from a name as ``parse_layout`` takes it."""
    parallel = parse_layout(name)
    return LayoutCase(model=model, name=name.replace(" ", "-"), parallel=parallel, **settings)


_GROUPED_LAYOUTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dp1", {}),
    ("dp2", {"distributed": True}),
    ("ep2 dp2", {}),
    ("ep2 dp2", {"distributed": True}),
    ("ep2 tp2 sp", {"recompute": "full"}),
    ("ep4 tp2 sp dp2", {}),
    ("ep2 pp2 dp2", {}),
    ("ep2 cp2", {}),
    ("etp2 dp2", {"distributed": True}),
    ("ep2 etp2 dp4", {}),
    ("ep2 etp2 tp2 sp dp2", {"distributed": True}),
)
"""Of grouped experts; sequential ones have their share of the layouts below."""

CASES = (
    _case("qwen3-tied", "tp2", is_slow=False),
    _case("qwen3-tied", "pp2", is_slow=False),
    _case("qwen3-tied", "cp2", is_slow=False),
    _case("qwen3-tied", "dp2", distributed=True, is_slow=False),
    _case("qwen3", "tp2 sp", recompute="full", is_slow=False),
    _case("qwen3-moe", "ep2 dp2", is_slow=False),
    _case("qwen3-moe", "etp2 tp2 sp", experts="grouped", is_slow=False),
    _case("qwen3", "tp2"),
    _case("qwen3", "pp2"),
    _case("qwen3", "dp2"),
    _case("qwen3-tied", "tp2 sp"),
    _case("qwen3-tied", "pp2 vpp2"),
    _case("qwen3", "pp2 vpp2"),
    _case("qwen3", "pp4"),
    _case("qwen3-tied", "pp2 (1+3)"),
    _case("qwen3", "pp3 (1+2+1)"),
    _case("qwen3-tied", "tp2 sp pp2 (1+3)"),
    _case("qwen3", "cp2 pp2 (3+1)", distributed=True),
    _case("qwen3-tied", "tp2 pp2"),
    _case("qwen3", "tp2 pp2", recompute="full"),
    _case("qwen3-tied", "tp2 dp2", distributed=True),
    _case("qwen3", "tp2 sp pp2 vpp2"),
    _case("qwen3", "cp2", recompute="full"),
    _case("qwen3", "cp4"),
    _case("qwen3", "cp2 tp2"),
    _case("qwen3-tied", "cp2 tp2 sp"),
    _case("qwen3-tied", "cp2 pp2"),
    _case("qwen3", "cp2 pp2 vpp2"),
    _case("qwen3-tied", "cp2 dp2"),
    _case("qwen3-tied", "cp2 dp2", distributed=True),
    _case("qwen3-moe", "dp2"),
    _case("qwen3-moe", "tp2 sp"),
    _case("qwen3-moe", "pp2 vpp2"),
    _case("qwen3-moe", "cp2"),
    _case("qwen3-moe", "ep2 dp2", distributed=True),
    _case("qwen3-moe", "ep2 tp2 sp", recompute="full"),
    _case("qwen3-moe", "ep2 cp2"),
    _case("qwen3-moe", "ep4 dp4"),
    _case("qwen3-moe", "ep2 dp4", distributed=True),
    _case("qwen3-moe", "ep4 tp2 sp dp2"),
    _case("qwen3-moe", "ep2 pp2 dp2"),
    _case("qwen3-moe", "pp2 (3+1)"),
    _case("qwen3-moe", "tp2 sp pp2"),
    _case("qwen3-moe", "ep2 cp2 pp2"),
    _case("qwen3-moe", "ep2 pp2 vpp2 dp2", experts="grouped", distributed=True),
    *(
        _case("qwen3-moe", name, experts="grouped", **settings)
        for name, settings in _GROUPED_LAYOUTS
    ),
    _case("qwen3-moe", "etp2 dp2"),
    _case("qwen3-moe", "ep2 etp2 tp2 sp dp2"),
    *(
        _case(model, name)
        for model in ("llama-3", "qwen2.5-tied")
        for name in ("tp2 sp", "pp2", "cp2", "dp2")
    ),
    _case("llama-3", "pp2 vpp2"),
    _case("qwen3-tied", "tp2 sp pp2 cp2"),
    _case("qwen3", "tp2 sp pp2 vpp2 dp2", distributed=True),
    _case("qwen3", "tp2 cp2 dp2", distributed=True),
    _case("qwen3-moe", "tp2 sp pp2 ep2 dp2", distributed=True),
    _case("qwen3-moe", "tp2 sp cp2 ep4 dp2"),
    _case("qwen3-moe", "tp2 sp pp2 ep2 etp2 dp2", experts="grouped"),
    _case("qwen3-moe", "tp2 sp pp2 vpp2 ep4 dp2", experts="grouped", distributed=True),
)
"""Every layout that is checked; the last ones have eight processes."""


def batch_for(
    parallel: ParallelConfig, sequences: Sequence[TrainingSequence] | None = None
) -> PackedBatch:
    """Return ``sequences`` (by default the usual ones) packed for a layout."""
    return make_batch(
        sequences,
        num_ranks=parallel.data_parallel_size,
        streams_multiple=parallel.pipeline_model_parallel_size,
        sequence_multiple=parallel.sequence_multiple,
    )


def train(
    rank: int,
    folder: Path,
    parallel: ParallelConfig,
    distributed: bool,
    recompute: str,
    experts: str | None,
) -> Outcome:
    """Update three times on the same batch; the function that runs on every rank."""
    optimizer = OptimizerConfig(
        lr=1e-3,
        eps=ADAM_EPS,
        clip_grad=NO_CLIPPING,
        weight_decay=0.1,
        use_distributed_optimizer=distributed,
    )
    policy = build_policy(
        folder, parallel=parallel, optimizer=optimizer, recompute=recompute, experts=experts
    )
    batch = batch_for(parallel)
    before = _by_sequence(policy, batch)
    results = [policy.update(batch)]
    gradients = gradients_of(policy)
    results += [policy.update(batch) for _ in range(NUM_STEPS - 1)]
    if rank or parallel.world_size > 1:
        assert cpu_runtime.redirected_functions() <= KNOWN_REDIRECTIONS
    return Outcome(
        gradients=gradients,
        weights=weights_of(policy),
        results=results,
        statistics_before=before,
        statistics_after=_by_sequence(policy, batch),
    )


def train_on_ranks(folder: Path, case: LayoutCase) -> list[Outcome]:
    """Return what every rank of a layout saw."""
    return run_on_ranks(
        train,
        folder,
        case.parallel,
        case.distributed,
        case.recompute,
        case.experts,
        world_size=case.parallel.world_size,
    )


def train_alone(model: PreTrainedModel, folder: Path) -> Reference:
    """Return the truth about a model, which is written into ``folder``."""
    write_model_folder(model, folder)
    one = train(0, folder, parallel_config(), False, "none", None)
    return Reference(folder=folder, one=one, statistics=hf_statistics(folder))


def hf_statistics(folder: Path) -> list[Tensor]:
    """Return [rows, 2] logprobs and entropies of each of the usual sequences by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch = make_batch()
    with torch.no_grad():
        rows = [torch.stack(hf_row_statistics(model, stream), 1) for stream in batch.streams]
    return _split(batch, rows)


def measure(outcomes: list[Outcome], reference: Reference) -> Errors:
    """Return the largest errors over all ranks."""
    one = reference.one
    norms = [result.gradient_norm for result in one.results]
    return Errors(
        logprobs=max(
            float((mine - true).abs().max())
            for outcome in outcomes
            for mine, true in zip(outcome.statistics_before, reference.statistics, strict=True)
        ),
        gradients=max(max_difference(outcome.gradients, one.gradients) for outcome in outcomes),
        gradient_norm=max(
            abs(result.gradient_norm / norm - 1.0)
            for outcome in outcomes
            for result, norm in zip(outcome.results, norms, strict=True)
        ),
        weights=max(max_difference(outcome.weights, one.weights) for outcome in outcomes),
    )


def assert_within_tolerance(errors: Errors) -> None:
    """Fail if a layout's numbers are further from the truth than float32 explains."""
    assert errors.logprobs < LOGPROB_TOLERANCE
    assert errors.gradients < GRADIENT_TOLERANCE
    assert errors.gradient_norm < NORM_TOLERANCE
    assert errors.weights < WEIGHT_TOLERANCE


def assert_equal_reports(outcomes: list[Outcome], one: Outcome) -> None:
    """Fail if a rank's losses, metrics or later logprobs are not those of one process."""
    for outcome in outcomes:
        for mine, theirs in zip(outcome.results, one.results, strict=True):
            assert mine.loss == pytest.approx(theirs.loss, abs=1e-5)
            assert _exact(mine) == pytest.approx(_exact(theirs), abs=1e-4)
            quantiles = mine.metrics[GAP_P99], theirs.metrics[GAP_P99]
            assert quantiles[0] == pytest.approx(quantiles[1], rel=4 * RELATIVE_ERROR)
        for mine, theirs in zip(outcome.statistics_after, one.statistics_after, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)  # logits are of size 10


def _exact(result: UpdateResult) -> dict[str, float]:
    """Return the metrics but the one that rounding can move to the next bin of a histogram."""
    return {name: value for name, value in result.metrics.items() if name != GAP_P99}


def _by_sequence(policy: MegatronPolicy, batch: PackedBatch) -> list[Tensor]:
    """Return [rows, 2] logprobs and entropies of each sequence."""
    rows = [
        torch.stack([torch.from_numpy(part) for part in both], 1)
        for both in policy.row_statistics(batch)
    ]
    return _split(batch, rows)


def _split(batch: PackedBatch, rows: list[Tensor]) -> list[Tensor]:
    """Return the rows of streams by sequence."""
    by_sequence: dict[int, list[Tensor]] = {}
    for stream, values in zip(batch.streams, rows, strict=True):
        for index, row in zip(stream.sequence_index_R.tolist(), values, strict=True):
            by_sequence.setdefault(index, []).append(row)
    return [torch.stack(by_sequence[index]) for index in range(batch.num_sequences)]
