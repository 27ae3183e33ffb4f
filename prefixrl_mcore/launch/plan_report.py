"""Predicted memory and time as tables and lines of ``prefixrl check``."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from prefixrl_mcore.accounting.host_memory import HostMemory
from prefixrl_mcore.accounting.layouts import Plan
from prefixrl_mcore.accounting.memory import StageMemory
from prefixrl_mcore.accounting.step_time import Assumptions, StepTime
from prefixrl_mcore.config.policy import ParallelConfig, PolicyConfig

_GIB = 1024**3

_PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "buffers",
    "head",
    "backward",
    "embedding",
    "optimizer_step",
)
"""Fields of ``StageMemory``, in its order."""

_NUM_SUGGESTIONS = 5


def memory_table(stages: Sequence[StageMemory], usable_bytes: float) -> Table:
    """Return GiB of one rank by part, a column for each pipeline stage."""
    table = Table(title="predicted memory of a rank, GiB")
    table.add_column("")
    for stage in stages:
        table.add_column("every rank" if len(stages) == 1 else f"stage {stage.stage}")
    for part in _PARTS:
        table.add_row(part.replace("_", " "), *(_gib(getattr(stage, part)) for stage in stages))
    table.add_section()
    table.add_row("peak", *(_peak(stage, usable_bytes) for stage in stages))
    table.caption = (
        "head, backward, embedding and optimizer step follow one another: the peak has the largest"
    )
    return table


def knob_lines(turned: Sequence[tuple[str, Plan]], usable_bytes: float) -> Iterator[str]:
    """Yield what single changes would do, the most helpful first."""
    for what, plan in sorted(turned, key=lambda entry: entry[1].peak_bytes):
        verdict = "fits" if plan.peak_bytes <= usable_bytes else "does not fit"
        yield f"  {what}: {_gib(plan.peak_bytes)} GiB, {verdict}"
    if not any(plan.peak_bytes <= usable_bytes for _, plan in turned):
        yield "  no single change is enough; --suggest looks for other layouts"


def host_line(host: HostMemory, num_ranks: int) -> str:
    """Return what a rank needs of its machine's memory."""
    parts = {"reference": host.reference, "offloaded optimizer": host.offloaded, "save": host.save}
    terms = " + ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)
    return (
        f"host memory of a rank: at most {_gib(host.total)} GiB = {terms} (of it "
        f"{_gib(host.written)} until the save is on disk), besides Python and the engine; "
        f"{num_ranks} rank(s) a machine take up to {_gib(num_ranks * host.total)}"
    )


def time_lines(time: StepTime, assumptions: Assumptions) -> Iterator[str]:
    """Yield the predicted time of a step with what was assumed."""
    yield (
        f"predicted step: {time.total:.3g} s = rollout {time.rollout:.3g} + "
        + (f"reference {time.reference:.3g} + " if time.reference else "")
        + f"update {time.update:.3g} (computing {time.compute:.3g}, pipeline bubble "
        f"{time.bubble:.3g}, communication {time.communication:.3g})"
    )
    if assumptions.rollout_gpus is not None:
        bound = " (bound by reading memory)" if time.rollout == assumptions.decode_seconds else ""
        yield f"  sampling on {assumptions.rollout_gpus} GPU(s){bound}"
    yield (
        f"  assumed: {assumptions.peak_flops / 1e12:.4g} TFLOP/s a GPU, of it "
        f"{assumptions.update_efficiency:.0%} in the update and "
        f"{assumptions.rollout_efficiency:.0%} in sampling; "
        f"{assumptions.fast_bytes_per_second / 1e9:g} GB/s within "
        f"{assumptions.gpus_per_node} GPUs, {assumptions.slow_bytes_per_second / 1e9:g} beyond"
    )


def suggestion_lines(
    plans: Sequence[Plan], usable_bytes: float, policy: PolicyConfig, *, num_gpus: int
) -> Iterator[str | Table]:
    """Yield a table of the best plans, and those that fit as lines of a config.

    Args:
        plans: the best first.
        usable_bytes: what a rank may use.
        policy: the settings at hand, which the lines change.
        num_gpus: trainer ranks of the plans.
    """
    if not plans:
        yield f"no layout of {num_gpus} GPUs can run this model; try another number of GPUs"
        return
    fitting = [plan for plan in plans if plan.peak_bytes <= usable_bytes]
    yield _plan_table(plans[:_NUM_SUGGESTIONS], usable_bytes, len(fitting), len(plans))
    if not fitting:
        smallest = min(plan.peak_bytes for plan in plans)
        yield (
            f"no layout of {num_gpus} GPUs fits: the smallest needs {_gib(smallest)} GiB of "
            f"{_gib(usable_bytes)}; take more GPUs or larger ones, or shorter streams "
            "(rollout.max_total_tokens, batch.stream_tokens)"
        )
    for number, plan in enumerate(fitting[:_NUM_SUGGESTIONS], 1):
        yield f"# {number}: {layout_name(plan.policy.parallel)}"
        yield from config_lines(plan.policy, policy)


def _plan_table(
    plans: Sequence[Plan], usable_bytes: float, num_fitting: int, num_plans: int
) -> Table:
    """Return what plans need, one a row."""
    table = Table(title=f"{num_fitting} of {num_plans} layouts fit")
    for name in ("", "layout", "recompute", "GiB", "step s", "update s", "bubble s", "network s"):
        table.add_column(name)
    for plan in plans:
        time = plan.time
        table.add_row(
            "fits" if plan.peak_bytes <= usable_bytes else "too large",
            layout_name(plan.policy.parallel),
            plan.policy.recompute,
            _gib(plan.peak_bytes),
            *(f"{value:.3g}" for value in (time.total, time.update, time.bubble)),
            f"{time.communication:.3g}",
        )
    return table


def layout_name(parallel: ParallelConfig) -> str:
    """Return a layout in the usual abbreviations, sizes of 1 left out."""
    virtual = parallel.virtual_pipeline_model_parallel_size
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "VPP": virtual or 1,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
        "DP": parallel.data_parallel_size,
    }
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return " x ".join(words) + (" SP" if parallel.sequence_parallel else "") or "one rank"


def config_lines(policy: PolicyConfig, present: PolicyConfig) -> Iterator[str]:
    """Yield a plan's settings as lines of a TOML file, in place of the present ones.

    What has to go because TOML cannot set it to nothing is named in comments.

    Args:
        policy: the plan's.
        present: the config's.
    """
    yield "[policy]"
    yield f'recompute = "{policy.recompute}"'
    if present.recompute_modules is not None and policy.recompute_modules is None:
        yield "# without recompute_modules"
    yield "[policy.parallel]  # with nothing else in it"
    for name, value in policy.parallel.model_dump(exclude_defaults=True).items():
        yield f"{name} = {str(value).lower()}"
    yield "[policy.optimizer]"
    is_sharded = policy.optimizer.use_distributed_optimizer
    yield f"use_distributed_optimizer = {str(is_sharded).lower()}"


def _gib(num_bytes: float) -> str:
    """Return bytes as GiB."""
    return f"{num_bytes / _GIB:.2f}"


def _peak(stage: StageMemory, usable_bytes: float) -> str:
    """Return a stage's peak, marked if it does not fit."""
    return _gib(stage.total) + (" (too large)" if stage.total > usable_bytes else "")
