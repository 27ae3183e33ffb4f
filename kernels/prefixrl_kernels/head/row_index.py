"""Which hidden rows the head reads, and the way back for their gradient.

The index is built on the host from the layout of the batch: the device is never asked. A hidden
row may be named several times (the last row of a shared prefix predicts the first token of every
branch); its gradient is then the sum over its uses, in the order of the index.

Shape suffixes: ``T`` hidden rows, ``R`` rows of the head, ``U`` different hidden rows among them,
``H`` hidden size.
"""

# ruff: noqa: N815 - record fields carry shape suffixes

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class RowIndex:
    """Rows of the head as positions among the hidden rows."""

    num_rows: int
    """R."""

    num_hidden_rows: int
    """T."""

    rows_R: Tensor | None
    """[R] int64 on the device; None when the rows are all hidden rows in order."""

    unique_rows_U: Tensor | None
    """[U] int64 on the device, ascending; None when the rows are all hidden rows in order."""

    members_R: Tensor | None
    """[R] int64 on the device: positions in ``rows_R``, ordered by hidden row, then position."""

    starts_U1: Tensor | None
    """[U + 1] int64 on the device: where each hidden row's members start in ``members_R``."""

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    """On the host, (positions in ``rows_R``, hidden rows): the first use of every hidden row, then
    the second of those that have one, and so on. No hidden row occurs twice in a layer."""

    @property
    def has_duplicates(self) -> bool:
        """Whether some hidden row is used more than once."""
        return len(self.layers) > 1

    @classmethod
    def build(
        cls,
        rows_R: Tensor | np.ndarray | Sequence[int] | None,
        *,
        num_hidden_rows: int,
        device: torch.device,
    ) -> "RowIndex":
        """Return the index of host-side ``rows_R`` for hidden states on ``device``.

        Args:
            rows_R: [R] integers in [0, num_hidden_rows), on the host, in any order; None is all.
            num_hidden_rows: T.
            device: where the hidden states are.

        Raises:
            ValueError: if the rows are on a device, not integers, not 1-D or out of range.
        """
        host_R = None if rows_R is None else _host_rows(rows_R, num_hidden_rows)
        if host_R is None or np.array_equal(host_R, np.arange(num_hidden_rows)):
            return cls(
                num_rows=num_hidden_rows,
                num_hidden_rows=num_hidden_rows,
                rows_R=None,
                unique_rows_U=None,
                members_R=None,
                starts_U1=None,
                layers=(),
            )
        members_R = np.argsort(host_R, kind="stable")
        unique_U, starts_U = np.unique(host_R[members_R], return_index=True)
        counts_U = np.diff(starts_U, append=len(host_R))
        layers = []
        for layer in range(int(counts_U.max(initial=0))):
            present_U = counts_U > layer
            positions = members_R[starts_U[present_U] + layer]
            layers.append((positions, unique_U[present_U]))
        return cls(
            num_rows=len(host_R),
            num_hidden_rows=num_hidden_rows,
            rows_R=_to_device(host_R, device),
            unique_rows_U=_to_device(unique_U, device),
            members_R=_to_device(members_R, device),
            starts_U1=_to_device(np.append(starts_U, len(host_R)), device),
            layers=tuple(layers),
        )

    def gather(self, hidden_TH: Tensor) -> Tensor:
        """Return the named rows, [R, H], contiguous."""
        if self.rows_R is None:
            return hidden_TH.contiguous()
        return hidden_TH.index_select(0, self.rows_R)


def _host_rows(rows_R: Tensor | np.ndarray | Sequence[int], num_hidden_rows: int) -> np.ndarray:
    """Return checked rows as an int64 array."""
    if isinstance(rows_R, Tensor):
        if rows_R.device.type != "cpu":
            raise ValueError(
                f"head: rows must be on the host, got a tensor on {rows_R.device}; build them from "
                "the layout of the batch, which the host knows, or copy them with rows.cpu()"
            )
        rows_R = rows_R.numpy()
    array_R = np.asarray(rows_R)
    if not array_R.size:
        array_R = array_R.astype(np.int64)
    if array_R.ndim != 1 or array_R.dtype.kind not in "iu":
        raise ValueError(
            f"head: rows must be one-dimensional integers, got {array_R.ndim} dimension(s) of "
            f"{array_R.dtype}; a mask becomes rows with mask.nonzero()"
        )
    if array_R.size and not (array_R.min() >= 0 and array_R.max() < num_hidden_rows):
        raise ValueError(
            f"head: rows must be in [0, {num_hidden_rows}), the number of hidden rows; got "
            f"{array_R.min()} to {array_R.max()}"
        )
    return array_R.astype(np.int64)


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Return the array on ``device``; from pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
