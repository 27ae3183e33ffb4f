"""How long the supervised phase of ``sft_then_rl`` is, for ``prefixrl check``."""

from collections.abc import Mapping

from prefixrl_mcore.accounting.flops import update_flops
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.config.sft import check_trace_lengths
from prefixrl_mcore.data.traces import TraceStore


def supervised_rows(config: RunConfig, num_parameters: int) -> list[tuple[str, str]]:
    """Return the table's row: steps, tokens and FLOPs at most; without traces what is known.

    Args:
        config: the run's; other methods than ``sft_then_rl`` have no row.
        num_parameters: that are active for a token.

    Raises:
        ConfigError: if training would refuse the traces that are there, unless there are too few
            of them yet to hold one back.
        ValueError: if the store is damaged.
    """
    if config.method != "sft_then_rl":
        return []
    num_tokens = _tokens_by_problem(config)
    text = _of_traces(config, num_tokens, num_parameters) if num_tokens else _without(config)
    return [("supervised phase", text)]


def _tokens_by_problem(config: RunConfig) -> dict[str, int]:
    """Return the tokens of each problem's first trace with its prompt; none without a store."""
    if not TraceStore.is_in(config.traces_folder):
        return {}
    traces = TraceStore.open(config.traces_folder).first_traces()
    return {problem_id: trace.num_tokens for problem_id, trace in traces.items()}


def _without(config: RunConfig) -> str:
    """Return what is known before there are traces."""
    sft, most = config.sft, config.rollout.max_total_tokens
    return (
        f"at most {sft.max_epochs} epochs, {sft.traces_per_step} traces a step; the steps are "
        "known when the traces are there\n"
        f"tokens of a step: at most {sft.traces_per_step * most:.4g} "
        f"({sft.traces_per_step} x {most})"
    )


def _of_traces(config: RunConfig, num_tokens: Mapping[str, int], num_parameters: int) -> str:
    """Return what the traces make of the phase."""
    sft, num_traces = config.sft, len(num_tokens)
    check_trace_lengths(num_tokens, config.stream_tokens)
    try:
        num_held_back = sft.num_held_back(num_traces)
    except ConfigError as error:  # as beside a collection that goes on
        return f"cannot begin yet: {error}"
    sft.check_phase(config.policy.optimizer, num_traces)
    per_epoch = sft.steps_per_epoch(num_traces - num_held_back)
    lengths = sorted(num_tokens.values())
    tokens = sft.max_epochs * sum(lengths[num_held_back:])  # as if the shortest were held back
    return (
        f"at most {sft.max_epochs * per_epoch} steps = {sft.max_epochs} epochs x {per_epoch}, "
        f"{sft.traces_per_step} traces a step; {num_held_back} of {num_traces} are held back\n"
        f"tokens: at most {tokens:.4g}, {update_flops(num_parameters, tokens):.3g} FLOPs (6ND "
        f"update); the longest trace has {lengths[-1]} with its prompt, a stream "
        f"{config.stream_tokens}"
    )
