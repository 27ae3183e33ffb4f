"""``prefixrl check``: what a config would run, worked out without starting anything.

Memory and time are arithmetic (``accounting.memory``, ``accounting.step_time``), not measurements;
``docs/memory.md`` compares the former with measured peaks.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from prefixrl_mcore.accounting.flops import sampling_flops, update_flops
from prefixrl_mcore.accounting.hardware import peak_flops
from prefixrl_mcore.accounting.host_memory import estimate_host
from prefixrl_mcore.accounting.layouts import Plan, full_workload, make_plan, search
from prefixrl_mcore.accounting.memory import estimate_stages
from prefixrl_mcore.accounting.parameters import ModelSize, model_size
from prefixrl_mcore.accounting.step_time import StepWork
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.layout import (
    check_divisible,
    check_experts,
    check_positions,
    check_stream,
    check_supported,
)
from prefixrl_mcore.config.model_shape import (
    ModelShape,
    check_reference,
    read_hf_config,
    read_model_shape,
)
from prefixrl_mcore.config.precision import check_precision
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.config.server_gpus import check_server_gpus
from prefixrl_mcore.launch.completions import completions_text
from prefixrl_mcore.launch.knobs import knobs
from prefixrl_mcore.launch.machine import Machine
from prefixrl_mcore.launch.plan_report import (
    host_line,
    knob_lines,
    memory_table,
    suggestion_lines,
    time_lines,
)
from prefixrl_mcore.launch.server_plan import (
    own_server_lines,
    predict_server,
    share_gpus,
    shared_server_lines,
    with_sampling,
    with_servers_of_all_nodes,
)
from prefixrl_mcore.launch.supervised import supervised_rows


def print_check(
    config: RunConfig, machine: Machine, console: Console | None = None, *, suggest: bool = False
) -> None:
    """Print layout, batch, FLOPs, and predicted memory and time of a config.

    With ``suggest``, or when the config's layout has another number of ranks than the machine, the
    best layouts follow.

    Raises:
        ConfigError: if training would refuse the model or the layout.
    """
    console = console or Console()
    shape = read_shape(config)
    layout_ranks = config.policy.parallel.world_size
    num_gpus = layout_ranks if machine.num_gpus is None else machine.num_gpus
    work = step_work(config, machine.mean_tokens)
    if num_gpus == layout_ranks:
        check_layout(config, shape)
        _check_server_gpus(config, machine)
    config = with_servers_of_all_nodes(config, machine)
    machine = with_sampling(config, shape, work, machine)
    if num_gpus == layout_ranks:
        _check_min_servers(config, machine)
        _print_config(config, shape, console)
        _print_plan(config, shape, work, machine, console)
    else:
        console.print(
            f"policy.parallel has {layout_ranks} ranks, --gpus is {num_gpus}: looking for layouts"
        )
    if suggest or num_gpus != layout_ranks:
        _print_suggestions(config, shape, work, machine, num_gpus, console)
    missing = [str(p) for p in input_paths(config) if not p.exists()]
    if missing:
        console.print(f"not there yet: {', '.join(missing)}", style="yellow", highlight=False)


def gpu_flops(config: RunConfig, gpu: str) -> float:
    """Return the peak of one GPU: ``trainer.peak_flops``, or by the data sheet of ``gpu``.

    Raises:
        ConfigError: if neither says.
    """
    if config.trainer.peak_flops is not None:
        return config.trainer.peak_flops
    found = peak_flops(gpu, config.policy.dtype)
    if found is None:
        raise ConfigError(
            f"--gpu {gpu!r}: no peak FLOPs are known for it; give trainer.peak_flops, FLOPs per "
            f"second in {config.policy.dtype}"
        )
    return found


def read_shape(config: RunConfig) -> ModelShape:
    """Return the shape in the model's ``config.json``.

    Raises:
        ConfigError: if training would refuse the file, sequences are too long for the model, or
            the reference of ``loss.kl`` is of another shape.
    """
    shape = read_model_shape(read_hf_config(config.model.path))
    check_positions(shape, config.rollout.max_total_tokens)
    reference = config.loss.reference_path
    if reference is not None and reference.exists():  # else it is among the missing inputs
        check_reference(shape, reference)
    return shape


def step_work(config: RunConfig, mean_tokens: float | None) -> StepWork:
    """Return the rollouts of a step; completions keep their share of the longest sequence.

    Raises:
        ConfigError: if ``mean_tokens`` is not between 1 and ``rollout.max_total_tokens``.
    """
    rollout = config.rollout
    mean = rollout.max_total_tokens if mean_tokens is None else mean_tokens
    if not 1 <= mean <= rollout.max_total_tokens:
        raise ConfigError(
            f"--mean-tokens must be between 1 and rollout.max_total_tokens = "
            f"{rollout.max_total_tokens}, got {mean:g}"
        )
    return StepWork(
        num_rollouts=config.batch.prompts_per_step * config.batch.group_size,
        mean_tokens=mean,
        mean_completion_tokens=mean * rollout.max_completion_tokens / rollout.max_total_tokens,
        stream_tokens=config.stream_tokens,
        group_size=config.batch.group_size,
        has_reference=config.loss.kl != "none",
    )


def check_layout(config: RunConfig, shape: ModelShape) -> None:
    """Refuse what training would refuse: an unsupported layout, or one that does not fit the model.

    Raises:
        ConfigError: with the numbers that do not fit.
    """
    check_supported(config.policy.parallel)
    check_divisible(shape, config.policy.parallel)
    check_experts(shape, config.policy)
    check_stream(config.policy.parallel, config.stream_tokens)
    check_precision(shape, config.policy, config.stream_tokens)


def _check_server_gpus(config: RunConfig, machine: Machine) -> None:
    """Refuse servers that the node of rank 0 has no GPUs for, unless they have nodes of their own.

    Raises:
        ConfigError: with the arithmetic.
    """
    per_node = machine.assumptions.gpus_per_node
    if machine.rollout_gpus is None:
        num_ranks = min(config.policy.parallel.world_size, per_node)
        check_server_gpus(config.rollout, num_trainer_ranks=num_ranks, num_gpus=per_node)


def _check_min_servers(config: RunConfig, machine: Machine) -> None:
    """Refuse fewer servers, of all nodes, than ``min_servers``.

    Raises:
        ConfigError: with both numbers.
    """
    servers = config.rollout.sglang
    if config.rollout.engine == "transformers":
        return
    gpus = machine.own_gpus(config.rollout)
    servers.check_min_servers(
        servers.num_members if gpus is None else gpus // servers.tensor_parallel_size
    )


def predict_rank_bytes(config: RunConfig) -> float:
    """Return the bytes that the trainer rank needs which needs most, on a GPU.

    Raises:
        ConfigError: if training would refuse the model or the layout.
    """
    shape = read_shape(config)
    check_layout(config, shape)
    stages = estimate_stages(
        shape,
        config.policy,
        full_workload(config.policy, step_work(config, mean_tokens=None)),
        logits_dtype=config.model.logits_dtype,
    )
    return max(stage.total for stage in stages)


def _print_config(config: RunConfig, shape: ModelShape, console: Console) -> None:
    """Print what would run."""
    table = Table(title=escape(f"{config.method}: {config.model.path}"), show_header=False)
    for name, value in _rows(config, shape, model_size(shape)):
        table.add_row(name, Text(value))
    console.print(table)


def _print_plan(
    config: RunConfig, shape: ModelShape, work: StepWork, machine: Machine, console: Console
) -> None:
    """Print memory by stage, the verdict with knobs to turn, and time."""
    plan = _plan(config, shape, work, machine)
    console.print(memory_table(plan.stages, machine.usable_bytes))
    limit = (
        f"{_gib(machine.usable_bytes)} of --gpu-memory {machine.memory_gib:g} GiB "
        f"({machine.reserved_fraction:.0%} reserved), for the trainer alone"
    )
    if plan.peak_bytes <= machine.usable_bytes:
        console.print(f"fits: {_gib(plan.peak_bytes)} in {limit}", style="green", highlight=False)
    else:
        console.print(
            f"does not fit: {_gib(plan.peak_bytes)} in {limit}", style="red", highlight=False
        )
        turned = [
            (what, _plan(changed, shape, step_work(changed, machine.mean_tokens), machine))
            for what, changed in _accepted_knobs(config, shape)
        ]
        _print_lines(knob_lines(turned, machine.usable_bytes), console)
    _print_servers(config, shape, plan, machine, console)
    parallel = config.policy.parallel
    host = estimate_host(shape, config.policy, has_reference=work.has_reference)
    num_together = min(parallel.world_size, machine.assumptions.gpus_per_node)
    _print_lines([host_line(host, num_together)], console)
    _print_lines(time_lines(plan.time, machine.assumptions), console)
    num_ranks = parallel.data_parallel_size
    if num_ranks > work.num_units:
        console.print(
            f"{num_ranks - work.num_units} of {num_ranks} data-parallel ranks have nothing to do: "
            f"{work.num_rollouts} rollouts are {work.num_units} part(s), groups that fit into a "
            "stream being kept whole",
            style="yellow",
            highlight=False,
        )


def _print_servers(
    config: RunConfig, shape: ModelShape, plan: Plan, machine: Machine, console: Console
) -> None:
    """Print what a SGLang server has room for, and whether it fits, beside the trainer or alone."""
    if config.rollout.engine == "transformers":
        return
    server = predict_server(config, shape, machine)
    own_gpus = machine.own_gpus(config.rollout)
    if own_gpus is not None:
        _print_lines(own_server_lines(server, config.rollout, own_gpus, machine), console)
        return
    shared = share_gpus(config, shape, plan.stages, machine)
    lines = shared_server_lines(server, config.rollout, shared, plan.stages, machine)
    _print_lines(lines, console)


def _plan(config: RunConfig, shape: ModelShape, work: StepWork, machine: Machine) -> Plan:
    """Return the prediction for a config."""
    return make_plan(
        shape,
        config.policy,
        work,
        machine.assumptions,
        logits_dtype=config.model.logits_dtype,
    )


def _print_suggestions(
    config: RunConfig,
    shape: ModelShape,
    work: StepWork,
    machine: Machine,
    num_gpus: int,
    console: Console,
) -> None:
    """Print the best layouts of a number of GPUs."""
    plans = search(
        shape,
        config.policy,
        work,
        machine.assumptions,
        num_gpus=num_gpus,
        memory_bytes=machine.usable_bytes,
        logits_dtype=config.model.logits_dtype,
    )
    lines = suggestion_lines(plans, machine.usable_bytes, config.policy, num_gpus=num_gpus)
    _print_lines(lines, console)


def _print_lines(lines: Iterable[str | Table], console: Console) -> None:
    """Print lines and tables."""
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _accepted_knobs(config: RunConfig, shape: ModelShape) -> Iterator[tuple[str, RunConfig]]:
    """Yield the changes that training would accept."""
    for flags, changed in knobs(config):
        try:
            check_layout(changed, shape)
        except ConfigError:
            continue
        yield flags, changed


def _rows(config: RunConfig, shape: ModelShape, size: ModelSize) -> list[tuple[str, str]]:
    """Return the lines of the table."""
    parallel, batch, rollout = config.policy.parallel, config.batch, config.rollout
    num_rollouts = batch.prompts_per_step * batch.group_size
    most_tokens = num_rollouts * rollout.max_total_tokens
    n = size.num_active_parameters
    most_flops = sampling_flops(n, most_tokens) + update_flops(n, most_tokens)
    rule = "2ND sampling + 6ND update"
    if config.loss.kl != "none":
        most_flops += sampling_flops(n, most_tokens)
        rule += " + 2ND reference"
    layout = parallel.arithmetic
    if shape.mixture:
        layout += f", experts over {parallel.expert_model_parallel_size}"
        if parallel.expert_tensor_parallel_size > 1:
            layout += f" x {parallel.expert_tensor_parallel_size} (tensor)"
    return [
        (
            "parameters",
            f"{size.num_parameters:.4g} ({shape.num_layers} layers, hidden "
            f"{shape.hidden_size})" + (f", {n:.4g} for a token" if shape.mixture else ""),
        ),
        ("layout", layout),
        ("precision", _precision_row(config)),
        (
            "step",
            f"{batch.prompts_per_step} prompts x {batch.group_size} rollouts = {num_rollouts}",
        ),
        (
            "tokens of a step",
            f"at most {most_tokens:.4g} ({num_rollouts} x {rollout.max_total_tokens}), of them "
            f"{num_rollouts * rollout.max_completion_tokens:.4g} sampled",
        ),
        ("stream", f"{config.stream_tokens} tokens in one microbatch"),
        ("FLOPs of a step", f"at most {most_flops:.3g} ({rule})"),
        (
            "steps",
            f"{config.trainer.num_steps}: at most "
            f"{config.trainer.num_steps * most_flops:.3g} FLOPs",
        ),
        *supervised_rows(config, n),
        ("completions, at most", completions_text(config)),
        ("prefixes", _prefix_row(config)),
        ("rollout engine", rollout.engine or "sglang, or transformers where it does not start"),
        ("run folder", str(config.run_folder)),
    ]


def _precision_row(config: RunConfig) -> str:
    """Return the precision of the policy and of the logits, which the engine shares."""
    dtype = config.policy.dtype
    logits_dtype = config.model.logits_dtype if dtype == "bfloat16" else dtype
    return f"policy {dtype}, logits {logits_dtype} in trainer and engine"


def _prefix_row(config: RunConfig) -> str:
    """Return what is trained on."""
    prefixes = config.prefixes
    if config.method != "prefixrl":
        return "none: this method trains on the original problems"
    return (
        f"{prefixes.num_per_trace} per trace at {prefixes.min_fraction:.0%}-"
        f"{prefixes.max_fraction:.0%} of its tokens, mixed {prefixes.num_per_trace}:1 with the "
        "original problems"
    )


def input_paths(config: RunConfig) -> list[Path]:
    """Return the files and folders that the run reads."""
    inputs = [config.data.problems, *config.data.held_out.values()]
    if config.method == "prefixrl":
        inputs.append(config.prefixes_folder)
    if config.method != "rl":  # prefixrl too: the store says what the traces cost
        inputs.append(config.traces_folder)
    if config.loss.reference_path is not None:
        inputs.append(config.loss.reference_path)
    return inputs


def _gib(num_bytes: float) -> str:
    """Return bytes as GiB."""
    return f"{num_bytes / 1024**3:.2f} GiB"
