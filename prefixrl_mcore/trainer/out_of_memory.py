"""Running out of memory, told with the step's numbers and the settings to turn."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.data.packing import PackedBatch
from prefixrl_mcore.observability.phases import Phase, Phases
from prefixrl_mcore.policy.topology import Topology, is_from_first
from prefixrl_mcore.trainer.memory import read_peaks

logger = logging.getLogger(__name__)

_GIB = 1024**3
_MAX_TENSOR_PARALLEL = 8
"""Ranks of one machine, normally: tensor parallelism over more is slow."""

_ENGINE_PHASES: tuple[Phase, ...] = ("rollout", "verify", "eval")
"""Phases in which rank 0's engine or verifier computes, not the trainer."""

_MESSAGES = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUDA out of memory",  # of rank 0, where the error itself could not be passed on
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    "Failed to CUDA calloc",  # NCCL
    "Failed to CUDA host alloc",
    "Cuda failure 'out of memory'",
    "Cuda failure 2 'out of memory'",
)
"""What is in the text of a RuntimeError when memory outside torch's allocator has run out."""


class TrainerMemoryError(RuntimeError):
    """The trainer's device is out of memory; the message says what to turn."""


@contextmanager
def explained(
    config: RunConfig,
    topology: Topology,
    phases: Phases,
    *,
    what: str | None = None,
    batch: PackedBatch | None = None,
    predicted_bytes: float | None = None,
    snapshots: Path | None = None,
) -> Iterator[None]:
    """Turn an out-of-memory error of this rank into one that helps.

    No collective: the other ranks wait in one, and are ended by the launcher.

    Args:
        config: the run's settings, which the advice is taken from.
        topology: this rank's place.
        phases: asked when it happens for step and phase, which the advice depends on.
        what: what is under way; None says step and phase.
        batch: what was computed, if that is known.
        predicted_bytes: what ``prefixrl check`` says of a rank.
        snapshots: folder for a snapshot of GPU memory (https://pytorch.org/memory_viz).

    Raises:
        TrainerMemoryError: in place of PyTorch's error.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        phase = phases.failed or "other"
        doing = what or f"{phases.state.step or 'the start'}, phase {phase}"
        if is_from_first(error):
            raise TrainerMemoryError(
                f"out of memory on rank 0 in {doing}: {_first_line(error)}; the output of rank 0 "
                "says what to turn"
            ) from error
        snapshot = _write_snapshot(snapshots, topology, doing)
        raise TrainerMemoryError(
            "\n".join(
                [
                    f"out of memory on rank {topology.rank} in {doing}: {_first_line(error)}",
                    *([] if batch is None else [f"batch: {describe_batch(batch)}"]),
                    f"memory: {_describe_memory(topology.device, predicted_bytes)}",
                    *([] if snapshot is None else [f"snapshot of memory: {snapshot}"]),
                    "turn one of these, the cheapest first:",
                    *(f"  {line}" for line in _advice_in(phase, config, topology)),
                ]
            )
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the host has no memory left."""
    if isinstance(error, TrainerMemoryError):
        return False  # told already
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def _advice_in(phase: Phase, config: RunConfig, topology: Topology) -> list[str]:
    """Return the settings that save memory where it ran out, the cheapest first."""
    if phase in _ENGINE_PHASES and topology.is_first:
        return engine_advice(config)
    if phase == "save" and config.checkpoint.in_background:
        in_background = (
            "checkpoint.in_background = false: no copy of weights and optimizer in host memory "
            "beside the training steps"
        )
        return [in_background, *advice(config)]
    return advice(config)


def engine_advice(config: RunConfig) -> list[str]:
    """Return the settings that save memory of the rollout engine, the cheapest first."""
    rollout = config.rollout
    lines = [f"rollout.max_total_tokens below {rollout.max_total_tokens}: shorter sequences"]
    if rollout.engine == "transformers":
        size = rollout.transformers.max_batch_size
        return [f"rollout.transformers.max_batch_size below {size}: fewer at once", *lines]
    return [
        f"rollout.sglang.memory_fraction below {rollout.sglang.memory_fraction:g}, if the engine "
        "shares the trainer's GPUs",
        "rollout.sglang.max_kv_tokens: a smaller KV cache",
        *lines,
    ]


def advice(config: RunConfig) -> list[str]:
    """Return the settings that would save memory in this run, the cheapest first."""
    policy, parallel = config.policy, config.policy.parallel
    longest, shortest_stream = config.rollout.max_total_tokens, config.shortest_stream_tokens
    lines: list[str] = []
    if config.stream_tokens > shortest_stream:
        lines.append(
            f"batch.stream_tokens = {shortest_stream} (now {config.stream_tokens}; the longest "
            f"sequence needs {longest}): less activation memory, more microbatches"
        )
    if policy.recompute != "full":
        without = "" if policy.recompute_modules is None else " without recompute_modules"
        lines.append(
            f'policy.recompute = "full"{without} (now "{policy.recompute}"): keeps one tensor per '
            "layer, computes a third more"
        )
    lines.append(
        f"policy.head.memory_gb below {policy.head.memory_gb:g}: the head keeps less and computes "
        "more again"
    )
    if parallel.data_parallel_size * parallel.context_parallel_size > 1 and (
        not policy.optimizer.use_distributed_optimizer
    ):
        lines.append(
            "policy.optimizer.use_distributed_optimizer = true: the optimizer's state is spread "
            f"over {parallel.data_parallel_size * parallel.context_parallel_size} ranks"
        )
    if parallel.tensor_model_parallel_size < _MAX_TENSOR_PARALLEL:
        lines.append(
            f"policy.parallel.tensor_model_parallel_size above "
            f"{parallel.tensor_model_parallel_size}, with sequence_parallel = true: weights, "
            "optimizer and activations of a rank shrink"
        )
    lines.append(
        f"policy.parallel.context_parallel_size above {parallel.context_parallel_size}: fewer "
        "tokens of each sequence on a rank"
    )
    lines.append(
        f"policy.parallel.pipeline_model_parallel_size above "
        f"{parallel.pipeline_model_parallel_size}: fewer layers on a rank"
    )
    lines.append(f"rollout.max_total_tokens below {longest}: shorter sequences")
    if config.rollout.engine != "transformers":
        lines.append(
            f"rollout.sglang.memory_fraction below {config.rollout.sglang.memory_fraction:g}, if "
            "the engine shares the trainer's GPUs"
        )
    return lines


def describe_batch(batch: PackedBatch) -> str:
    """Return the numbers of a packed batch that decide its memory."""
    stream_tokens = len(batch.streams[0].token_ids_T)
    longest = max(int(max(s.sequence_starts[1:] - s.sequence_starts[:-1])) for s in batch.streams)
    return (
        f"{len(batch.streams)} streams of {stream_tokens} tokens over {batch.num_ranks} "
        f"data-parallel rank(s), {batch.num_sequences} sequences, longest {longest} tokens, at "
        f"most {max(s.num_rows for s in batch.streams)} completion tokens in a stream"
    )


def describe_bytes(num_bytes: float) -> str:
    """Return bytes as GiB."""
    return f"{num_bytes / _GIB:.2f} GiB"


def _describe_memory(device: torch.device, predicted_bytes: float | None) -> str:
    """Return what was predicted and what was measured."""
    peaks = read_peaks(device)
    said = "nothing" if predicted_bytes is None else describe_bytes(predicted_bytes)
    if device.type != "cuda":
        return f"{said} predicted; peak of the process {describe_bytes(peaks.rss)}"
    total = torch.cuda.get_device_properties(device).total_memory
    return (
        f"{said} predicted; peak {describe_bytes(peaks.allocated)} in tensors, "
        f"{describe_bytes(peaks.reserved)} with the allocator's gaps, of {describe_bytes(total)}"
    )


def _first_line(error: BaseException) -> str:
    """Return the first line of PyTorch's message, or the error's name."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _write_snapshot(folder: Path | None, topology: Topology, doing: str) -> Path | None:
    """Write what the GPU's memory holds; None on a CPU, or where it cannot be written."""
    if folder is None or topology.device.type != "cuda":
        return None
    name = "-".join(doing.replace(",", "").split())
    path = folder / f"out-of-memory-{name}-rank-{topology.rank:05d}.pickle"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError) as refusal:  # it must not hide what happened
        logger.warning("no snapshot of memory: %s", refusal)
        return None
    return path
