"""The search: only layouts that training accepts, the fitting and fast ones first."""

import itertools

from prefixrl_mcore.accounting.layouts import Plan, search
from prefixrl_mcore.accounting.step_time import Assumptions, StepWork
from prefixrl_mcore.config.layout import check_divisible, check_stream, check_supported
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import PolicyConfig
from tests.support.shapes import QWEN3_4B, QWEN3_30B_A3B, SMALL

GIB = 1024**3


def _search(
    shape: ModelShape, num_gpus: int, memory_gib: float, *, stream_tokens: int = 16_384
) -> list[Plan]:
    work = StepWork(
        num_rollouts=1024,
        mean_tokens=stream_tokens,
        mean_completion_tokens=stream_tokens / 2,
        stream_tokens=stream_tokens,
    )
    return search(
        shape,
        PolicyConfig(),
        work,
        Assumptions(peak_flops=989.4e12),
        num_gpus=num_gpus,
        memory_bytes=memory_gib * GIB,
        logits_dtype="float32",
    )


def test_every_plan_uses_all_gpus_and_passes_the_checks() -> None:
    plans = _search(QWEN3_30B_A3B, 16, 72)
    for plan in plans:
        parallel = plan.policy.parallel
        assert parallel.world_size == 16
        check_supported(parallel)
        check_divisible(QWEN3_30B_A3B, parallel)
        check_stream(parallel, 16_384)
    layouts = [(plan.policy.parallel, plan.policy.recompute) for plan in plans]
    assert len(layouts) == len(set(map(str, layouts)))
    assert {plan.policy.parallel.expert_model_parallel_size for plan in plans} == {1, 2, 4, 8, 16}


def test_fitting_plans_come_first_by_time_and_the_others_by_memory() -> None:
    plans = _search(QWEN3_4B, 8, 40)
    fits = [plan.peak_bytes <= 40 * GIB for plan in plans]
    assert fits == sorted(fits, reverse=True)
    assert 0 < sum(fits) < len(fits)
    fitting, others = plans[: sum(fits)], plans[sum(fits) :]
    assert all(a.time.total <= b.time.total for a, b in itertools.pairwise(fitting))
    assert all(a.peak_bytes <= b.peak_bytes for a, b in itertools.pairwise(others))


def test_a_small_model_is_replicated_and_not_recomputed() -> None:
    best = _search(SMALL, 8, 72, stream_tokens=1024)[0]
    assert best.policy.parallel.data_parallel_size == 8
    assert best.policy.recompute == "none"
    assert best.policy.optimizer.use_distributed_optimizer


def test_a_model_too_large_for_one_gpu_is_cut() -> None:
    best = _search(QWEN3_30B_A3B, 16, 72)[0]
    parallel = best.policy.parallel
    assert best.peak_bytes <= 72 * GIB
    cuts = parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size
    assert cuts * parallel.tensor_model_parallel_size > 1


def test_a_stream_that_does_not_divide_leaves_out_context_parallelism() -> None:
    plans = _search(SMALL, 4, 72, stream_tokens=1023)
    assert {plan.policy.parallel.context_parallel_size for plan in plans} == {1}
