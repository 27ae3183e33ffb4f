"""Which transport a run uses, and why."""

import logging
import os
from collections.abc import Collection
from pathlib import Path

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.sglang.launch import ALLOCATOR_VARIABLES
from prefixrl_mcore.rollout.weight_sync.by_location import ByLocation
from prefixrl_mcore.rollout.weight_sync.disk import Disk
from prefixrl_mcore.rollout.weight_sync.distributed import Broadcast
from prefixrl_mcore.rollout.weight_sync.releases import (
    nccl_version,
    own_nccl,
    own_torch,
    torch_release,
)
from prefixrl_mcore.rollout.weight_sync.tensor import TensorByHandle, TensorByValue
from prefixrl_mcore.rollout.weight_sync.transport import Transport

logger = logging.getLogger(__name__)

_EXPANDABLE = "expandable_segments:True"


def choose_transport(
    config: SGLangConfig, *, device: str, colocated: bool, folder: Path, urls_here: Collection[str]
) -> Transport:
    """Return the transport that ``sync.transport`` names, or the fastest that works; log why.

    Args:
        config: the servers, and how weights are to get to them.
        device: of the servers, ``cpu`` or ``cuda``.
        colocated: the servers share GPUs with trainer ranks.
        folder: of the run; gets the files of the transport ``disk``.
        urls_here: those of ``config.urls`` that are on this machine.

    Raises:
        ValueError: if the transport that is named cannot work.
    """
    transport, reason = _Choice(config, device, colocated, folder, urls_here).make()
    logger.info("weight sync: %s, because %s", transport.name, reason)
    return transport


class _Choice:
    """What it depends on."""

    def __init__(
        self,
        config: SGLangConfig,
        device: str,
        colocated: bool,
        folder: Path,
        urls_here: Collection[str],
    ) -> None:
        self._config, self._sync = config, config.sync
        self._device, self._colocated, self._folder = device, colocated, folder
        self._limit = config.sync.timeout_seconds
        self._here = [url for url in config.urls if url in urls_here]
        self._elsewhere = [url for url in config.urls if url not in urls_here]

    def make(self) -> tuple[Transport, str]:
        """Return the transport and the reason."""
        kind, reason = self._sync.transport, "rollout.sglang.sync.transport says so"
        if kind == "disk":
            return Disk(self._sync.folder or self._folder, timeout_seconds=self._limit), reason
        if kind == "distributed":
            self._check_places()
            self._check_nccl()
            return self._broadcast(), reason
        if kind == "tensor":
            return self._tensor(reason)
        if not self._config.urls:
            return self._tensor(f"the servers run on this machine's {self._device}")
        if self._colocated:
            return self._by_location()
        if self._device == "cuda":
            return self._broadcast(), "the servers have GPUs of their own and run elsewhere"
        return self._tensor("the servers have no GPU")

    def _by_location(self) -> tuple[Transport, str]:
        """Choose for servers that share the GPUs of trainer ranks, here and on other machines.

        Rank 0 and the servers beside it have GPUs in common, which no communicator may have twice.
        """
        if not self._here:
            return self._broadcast(), "the servers share no machine with rank 0"
        tensor, reason = self._tensor("the servers share the trainer's GPUs")
        if not self._elsewhere:
            return tensor, reason
        where = f"on this machine {', '.join(self._here)}; elsewhere {', '.join(self._elsewhere)}"
        return ByLocation(tensor, self._broadcast()), f"{reason}; {where}"

    def _broadcast(self) -> Broadcast:
        backend = "nccl" if self._device == "cuda" else "gloo"
        return Broadcast(backend, timeout_seconds=self._limit)

    def _tensor(self, reason: str) -> tuple[Transport, str]:
        """Send handles of GPU memory where they can be read, the bytes elsewhere."""
        obstacle = self._obstacle_to_handles()
        if not obstacle:
            return TensorByHandle(timeout_seconds=self._limit), reason
        by_value = TensorByValue(timeout_seconds=self._limit)
        return by_value, f"{reason}; no GPU handles: {obstacle}"

    def _obstacle_to_handles(self) -> str:
        """Return why GPU memory cannot be shared with the servers, or nothing.

        What torch writes into a handle is its own affair, so both sides must have the same release.
        """
        if self._device != "cuda":
            return "no GPU"
        if self._config.urls and not (self._colocated and self._here):
            return "the servers run elsewhere"
        if self._sync.transport is not None and self._elsewhere:
            return "some servers run elsewhere"
        theirs, ours = torch_release(self._config.python), own_torch()
        if theirs != ours:
            return f"the servers have torch {theirs or 'of unknown version'}, the trainer {ours}"
        for name in ALLOCATOR_VARIABLES:
            if _EXPANDABLE in os.environ.get(name, ""):
                # They are shared as open files, which the server would have to take from the
                # trainer's process: the right of a debugger.
                return f"{name} has {_EXPANDABLE}; leave it out"
        return ""

    def _check_places(self) -> None:
        """Refuse a broadcast to servers on rank 0's GPU, which no communicator may have twice.

        Raises:
            ValueError: with their URLs.
        """
        if self._colocated and self._here:
            raise ValueError(
                "rollout.sglang.sync.transport: 'distributed' gives each process of a broadcast a "
                f"GPU of its own, and with rollout.colocated {', '.join(self._here)} may be on "
                "rank 0's; leave the transport out, or take 'tensor' or 'disk'"
            )

    def _check_nccl(self) -> None:
        """Refuse servers of another NCCL, which would refuse the trainer.

        Raises:
            ValueError: with both versions.
        """
        if self._device != "cuda" or self._config.urls:
            return
        theirs, ours = nccl_version(self._config.python), own_nccl()
        if theirs and theirs != ours:
            raise ValueError(
                f"rollout.sglang.sync.transport: 'distributed' needs one NCCL on both sides, but "
                f"{self._config.python} has {theirs} and the trainer {ours}; take 'tensor' or "
                "'disk', or an environment of SGLang with the trainer's torch"
            )
