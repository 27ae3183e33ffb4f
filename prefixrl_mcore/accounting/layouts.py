"""Search of the layouts that a model and a number of GPUs allow.

Every combination of tensor, pipeline (plain and interleaved), context, expert and data parallel
sizes, with no, selective and full recomputation, that passes the checks of ``config.layout``.
Sequence parallelism goes with tensor parallelism, the distributed optimizer with replicas: both
save memory and cost next to nothing. Stages are equal, experts whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from prefixrl_mcore.accounting.memory import StageMemory, Workload, estimate_stages
from prefixrl_mcore.accounting.step_time import (
    Assumptions,
    StepTime,
    StepWork,
    estimate_step_time,
)
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.layout import (
    check_divisible,
    check_experts,
    check_stream,
    check_supported,
)
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import LogitsDtype, ParallelConfig, PolicyConfig
from prefixrl_mcore.config.precision import check_precision

_CHUNKS = (None, 2, 4)
"""Model chunks per stage that are tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A layout with what it is predicted to need."""

    policy: PolicyConfig
    """The settings."""

    stages: tuple[StageMemory, ...]
    """Memory of each pipeline stage."""

    time: StepTime
    """Of one step."""

    @property
    def peak_bytes(self) -> float:
        """Memory of the rank that needs most."""
        return max(stage.total for stage in self.stages)


def full_workload(policy: PolicyConfig, work: StepWork) -> Workload:
    """Return the most that a step can ask of the memory: full streams of nothing but rows."""
    return Workload(
        stream_tokens=work.stream_tokens,
        stream_rows=work.stream_tokens,
        num_microbatches=work.num_microbatches(policy.parallel),
    )


def make_plan(
    shape: ModelShape,
    policy: PolicyConfig,
    work: StepWork,
    assumptions: Assumptions,
    *,
    logits_dtype: LogitsDtype,
) -> Plan:
    """Return the prediction of one layout, which must have passed the checks.

    Memory is that of full streams in which every position is a row, and of the most padding that
    attention can need.
    """
    return Plan(
        policy=policy,
        stages=estimate_stages(
            shape, policy, full_workload(policy, work), logits_dtype=logits_dtype
        ),
        time=estimate_step_time(shape, policy, work, assumptions),
    )


def search(
    shape: ModelShape,
    policy: PolicyConfig,
    work: StepWork,
    assumptions: Assumptions,
    *,
    num_gpus: int,
    memory_bytes: float,
    logits_dtype: LogitsDtype,
) -> list[Plan]:
    """Return the plans of all layouts, the best first.

    Those that fit come first, by step time; then those that do not, by memory.

    Args:
        shape: the model.
        policy: precision, optimizer and head settings that the plans keep.
        work: the rollouts of one step.
        assumptions: about GPUs and network.
        num_gpus: trainer ranks.
        memory_bytes: what a rank may use.
        logits_dtype: of a bfloat16 model's logits.
    """
    plans = [
        make_plan(shape, candidate, work, assumptions, logits_dtype=logits_dtype)
        for candidate in _candidates(shape, policy, work, num_gpus, assumptions.gpus_per_node)
    ]

    def order(plan: Plan) -> tuple[bool, float, float]:
        fits = plan.peak_bytes <= memory_bytes
        return (not fits, plan.time.total if fits else plan.peak_bytes, plan.peak_bytes)

    return sorted(plans, key=order)


def _candidates(
    shape: ModelShape,
    policy: PolicyConfig,
    work: StepWork,
    num_gpus: int,
    gpus_per_node: int,
) -> Iterator[PolicyConfig]:
    """Yield the settings of every layout that training would accept."""
    sizes = _divisors(num_gpus)
    experts = sizes if shape.mixture else (1,)
    for tensor, pipeline, context in product(sizes, sizes, sizes):
        ranks = tensor * pipeline * context
        if num_gpus % ranks or tensor > gpus_per_node:
            continue
        for expert, chunks in product(experts, _CHUNKS if pipeline > 1 else (None,)):
            parallel = ParallelConfig(
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                virtual_pipeline_model_parallel_size=chunks,
                context_parallel_size=context,
                expert_model_parallel_size=expert,
                data_parallel_size=num_gpus // ranks,
                sequence_parallel=tensor > 1,
            )
            for candidate in _with_recomputation(policy, parallel):
                if _is_accepted(shape, candidate, work.stream_tokens):
                    yield candidate


def _with_recomputation(policy: PolicyConfig, parallel: ParallelConfig) -> Iterator[PolicyConfig]:
    """Yield a layout's settings without, with selective and with full recomputation."""
    has_replicas = parallel.data_parallel_size * parallel.context_parallel_size > 1
    is_sharded = has_replicas or policy.optimizer.use_precision_aware_optimizer
    optimizer = policy.optimizer.model_copy(update={"use_distributed_optimizer": is_sharded})
    update = {"parallel": parallel, "optimizer": optimizer, "recompute_modules": None}
    for recompute in ("none", "selective", "full"):
        yield policy.model_copy(update=update | {"recompute": recompute})


def _is_accepted(shape: ModelShape, policy: PolicyConfig, stream_tokens: int) -> bool:
    """Return whether training would accept a layout."""
    try:
        check_supported(policy.parallel)
        check_divisible(shape, policy.parallel)
        check_experts(shape, policy)
        check_stream(policy.parallel, stream_tokens)
        check_precision(shape, policy, stream_tokens)
    except ConfigError:
        return False
    return True


def _divisors(number: int) -> tuple[int, ...]:
    """Return all divisors, ascending."""
    return tuple(part for part in range(1, number + 1) if number % part == 0)
