"""Weights through files in a folder that trainer and servers share; works everywhere."""

import logging
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from prefixrl_mcore.rollout.weight_sync.buckets import Bucket
from prefixrl_mcore.rollout.weight_sync.transport import (
    DEFAULT_TIMEOUT_SECONDS,
    Failures,
    SyncTarget,
    on_all,
)

logger = logging.getLogger(__name__)

_WRITING, _COMPLETE = "writing-", "weights-"


class Disk:
    """Writes a safetensors file per bucket, then lets all servers read the folder.

    A folder has its final name only when all files are in it, and goes when the servers have read
    it. Nothing else may be in the parent folder, and one trainer at a time may use it.
    """

    name = "disk"
    has_session = False
    innocent: frozenset[str] = frozenset()

    def __init__(self, parent: Path, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        """Write below ``parent``, which every server must see under the same path.

        Args:
            parent: gets a folder for each update.
            timeout_seconds: how long a server may take to read a file, of all of them on average.
        """
        self._timeout_seconds = timeout_seconds
        self._parent = parent.absolute()
        self._folder: Path | None = None
        self._num_files = 0

    def open(self, targets: Sequence[SyncTarget]) -> Failures:
        """Make an empty folder; remove what a trainer that died left behind.

        Raises:
            OSError: if there is nowhere to write to.
        """
        self._parent.mkdir(parents=True, exist_ok=True)
        for left in self._parent.glob("*"):
            if left.name.startswith((_WRITING, _COMPLETE)):
                logger.warning("removing %s, which an earlier update left behind", left)
                shutil.rmtree(left, ignore_errors=True)
        self._folder = self._parent / f"{_WRITING}{uuid.uuid4().hex}"
        self._folder.mkdir()
        self._num_files = 0
        return {}

    def send(self, bucket: Bucket, targets: Sequence[SyncTarget]) -> Failures:
        """Write one file.

        Raises:
            OSError: if it cannot be written.
        """
        self._num_files += 1
        weights = {name: weight.cpu() for name, weight in bucket.weights()}
        save_file(weights, self._opened / f"model-{self._num_files:05}.safetensors")
        return {}

    def finish(self, targets: Sequence[SyncTarget]) -> Failures:
        """Let all targets read the files at once.

        Raises:
            OSError: if the folder cannot get its final name.
        """
        complete = self._parent / f"{_COMPLETE}{uuid.uuid4().hex}"
        os.rename(self._opened, complete)
        self._folder = complete
        limit = self._timeout_seconds * self._num_files
        return on_all(targets, lambda target: target.client.update_from_disk(complete, limit))

    def close(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    @property
    def _opened(self) -> Path:
        assert self._folder is not None, "open comes first"
        return self._folder
