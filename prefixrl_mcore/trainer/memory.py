"""Peak memory of a rank, and of all ranks together."""

import resource
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from prefixrl_mcore.policy.topology import Topology, gather_floats


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPeaks:
    """Bytes that one rank needed at most."""

    rss: int
    """Resident host memory since the process started; Linux keeps this peak for good. On a CPU
    it holds everything: weights, activations, the interpreter, and on rank 0 an engine of the same
    process."""

    allocated: int = 0
    """GPU memory in tensors since ``reset_peaks``; 0 on a CPU."""

    reserved: int = 0
    """GPU memory that PyTorch's allocator held since ``reset_peaks``, gaps included; 0 on a CPU."""

    @property
    def device(self) -> int:
        """What fills up first: GPU memory held, or host memory on a CPU."""
        return self.reserved or self.rss


def give_back_cached_memory() -> None:
    """Give GPU memory that the allocator only keeps for later to an engine on the same GPUs.

    All ranks call this, and it returns when all have done so.
    """
    torch.cuda.empty_cache()  # does nothing on a CPU
    if dist.is_initialized():
        dist.barrier()


def read_peaks(device: torch.device) -> MemoryPeaks:
    """Return this rank's peaks."""
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    if device.type != "cuda":
        return MemoryPeaks(rss=rss)
    return MemoryPeaks(
        rss=rss,
        allocated=torch.cuda.max_memory_allocated(device),
        reserved=torch.cuda.max_memory_reserved(device),
    )


def reset_peaks(device: torch.device) -> None:
    """Let GPU peaks begin anew; a process's peak of host memory cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_metrics(peaks_WK: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    """Return the largest of each kind over the ranks, and the first rank that has it.

    Args:
        peaks_WK: [world size, kinds] bytes; a kind that is 0 everywhere is left out.
        names: [kinds] what they are.
    """
    metrics: dict[str, float] = {}
    for name, peaks_W in zip(names, peaks_WK.T, strict=True):
        if peaks_W.any():
            metrics[f"memory/peak_{name}_bytes"] = float(peaks_W.max())
            metrics[f"memory/peak_{name}_rank"] = float(peaks_W.argmax())
    return metrics


def highest_peak(topology: Topology) -> tuple[int, int]:
    """Return (rank, bytes) of the rank that needed most on its device; all ranks call this."""
    peaks_W = gather_floats([float(read_peaks(topology.device).device)])[:, 0]
    return int(peaks_W.argmax()), int(peaks_W.max())
