"""What a step tells: rollouts, update, throughput, MFU, balance over ranks, peak memory.

docs/metrics.md lists every metric; a test compares it with what a run writes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from prefixrl_mcore.accounting.hardware import peak_flops
from prefixrl_mcore.data.packing import PackedBatch
from prefixrl_mcore.policy.topology import Topology, gather_floats
from prefixrl_mcore.records import UpdateResult
from prefixrl_mcore.trainer.generation import Generated
from prefixrl_mcore.trainer.groups import group_metrics
from prefixrl_mcore.trainer.memory import memory_metrics, read_peaks, reset_peaks

_MEMORY_NAMES = ("rss", "allocated", "reserved")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """What the trainer runs on."""

    num_ranks: int
    """Trainer ranks; on GPU machines one GPU each."""

    peak_flops: float | None
    """Peak of one rank's device in FLOPs per second; None when it is not known, then no MFU."""


def read_hardware(topology: Topology, *, dtype: str, configured_peak: float | None) -> Hardware:
    """Return what this run's ranks are.

    Args:
        topology: this rank's place; all ranks are taken to have the same device.
        dtype: of the operands of matrix products.
        configured_peak: ``trainer.peak_flops``; None takes the data sheet's of the GPU.
    """
    peak = configured_peak
    if peak is None and topology.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(topology.device), dtype)
    return Hardware(num_ranks=topology.world_size, peak_flops=peak)


def rollout_metrics(rollouts: Generated) -> dict[str, float]:
    """Return what was sampled for a step: over all verified groups, dropped ones included.

    What was cached is over all that was sampled, as in the tokens that are charged: the context of
    what goes on has its tokens so far.
    """
    num_context_tokens = rollouts.num_sampled_tokens - rollouts.num_new_tokens
    cached = {}
    if num_context_tokens:  # none where all groups were finished when they were carried here
        cached["rollout/cached_context_fraction"] = rollouts.num_cached_tokens / num_context_tokens
    return {
        **group_metrics([*rollouts.groups, *rollouts.dropped]),
        **cached,
        "rollout/tokens_per_second": rollouts.num_new_tokens / rollouts.sample_seconds,
        **rollouts.figures,
    }


def sync_share(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the share of a step in which weights were brought to the engine.

    Args:
        figures: of the engine and of the phases of the step; empty is returned where no weights
            were sent.
    """
    if "sync/seconds" not in figures:
        return {}
    return {"sync/step_fraction": figures["time/sync_seconds"] / figures["time/step_seconds"]}


def update_metrics(update: UpdateResult, *, policy_version: int) -> dict[str, float]:
    """Return what an update did; ``policy_version`` is that of the weights after it."""
    return {
        "loss/policy_gradient": update.loss,
        "policy/gradient_norm": update.gradient_norm,
        "policy/learning_rate": update.learning_rate,
        "policy/version": float(policy_version),
        "policy/was_skipped": float(update.was_skipped),
        **update.metrics,
    }


def batch_metrics(batch: PackedBatch) -> dict[str, float]:
    """Return how full the streams are, and how evenly they are spread over the ranks."""
    num_tokens = sum(len(stream.token_ids_T) for stream in batch.streams)
    return {
        "batch/num_streams": float(len(batch.streams)),
        "batch/padding_fraction": batch.num_padding_tokens / num_tokens,
        "balance/flops_max_over_mean": batch.cost_balance,
    }


def throughput_metrics(
    update: UpdateResult, hardware: Hardware, *, step_seconds: float
) -> dict[str, float]:
    """Return tokens and FLOPs per second and MFU, of the update and of the whole step.

    ``update`` is forward, backward and optimizer; ``step`` is everything, rollouts included, so
    that its figures say how well the trainer's devices are used overall. Tokens are those that
    the trainer computed, kept padding included; FLOPs are the model's
    (``ModelFlops.forward_backward``), nothing recomputed. An update that ran nothing has none.
    """
    metrics: dict[str, float] = {}
    update_seconds = update.forward_backward_seconds + update.optimizer_seconds
    for name, seconds in (("update", update_seconds), ("step", step_seconds)):
        if not update.num_computed_tokens:
            continue
        tokens, flops = update.num_computed_tokens / seconds, update.model_flops / seconds
        metrics |= {
            f"throughput/{name}_tokens_per_second": tokens,
            f"throughput/{name}_tokens_per_second_per_rank": tokens / hardware.num_ranks,
            f"throughput/{name}_flops_per_second": flops,
            f"throughput/{name}_flops_per_second_per_rank": flops / hardware.num_ranks,
        }
        if hardware.peak_flops is not None:
            peak = hardware.peak_flops * hardware.num_ranks
            metrics[f"throughput/{name}_mfu_fraction"] = flops / peak
    return metrics


def rank_metrics(topology: Topology, update: UpdateResult) -> Mapping[str, float]:
    """Return how evenly the ranks computed and what memory they needed; all ranks call this.

    Peaks of GPU memory are of this step: they begin anew here.
    """
    peaks = read_peaks(topology.device)
    reset_peaks(topology.device)
    mine = [update.compute_seconds, *(float(getattr(peaks, name)) for name in _MEMORY_NAMES)]
    figures = gather_floats(mine)
    return balance_metrics(figures[:, 0]) | memory_metrics(figures[:, 1:], _MEMORY_NAMES)


def balance_metrics(compute_seconds_W: np.ndarray) -> dict[str, float]:
    """Return how much longer the slowest rank computed than the mean, and which it is.

    Args:
        compute_seconds_W: [world size] seconds until each rank waits for the others' gradients.
    """
    mean = float(compute_seconds_W.mean())
    if not mean:
        return {}
    return {
        "balance/compute_seconds_max_over_mean": float(compute_seconds_W.max()) / mean,
        "balance/slowest_rank": float(compute_seconds_W.argmax()),
    }
