"""The memory of tensors, counted while code runs: ``max_memory_allocated`` for any device."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Adds up the memory behind every tensor that an operation makes, while it is alive.

    It sees a tensor that another thread releases, which torch's profiler does not; it does not see
    what an operation allocates inside itself, nor memory of the communication backend.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        """Count from now on; the memory of ``known`` tensors is left out."""
        super().__init__()
        self._sizes = {values.untyped_storage()._cdata: 0 for values in known}
        self.current = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.current -= self._sizes.pop(key)
