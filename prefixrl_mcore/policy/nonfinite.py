"""Finding what made a loss or gradient norm non-finite: a search over subsets of the batch.

Runs only when an update has failed, before anything was changed. Halves of the batch's sequences
are run again until single sequences are left: about log2(sequences) forward-backward passes for
each culprit, which finds a non-finite gradient behind a finite loss as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prefixrl_mcore.data.packing import PackedBatch, Stream

_MAX_CULPRITS = 8  # more say nothing more: then the weights or the whole batch are to blame


@dataclass(frozen=True, kw_only=True, slots=True)
class Culprit:
    """Sequences that make the update non-finite, on their own or only together."""

    sequence_ids: tuple[str, ...]
    """Rollout ids; several if only together."""

    data_parallel_rank: int | None
    """Data-parallel rank that ran them; None if several did."""

    microbatch: int | None
    """Which of that rank's microbatches, from 0; None if several."""

    def __str__(self) -> str:
        """Return for example ``rollout 3/0/1 (data-parallel rank 0, microbatch 2)``."""
        names = ", ".join(self.sequence_ids[:_MAX_CULPRITS])
        if len(self.sequence_ids) > _MAX_CULPRITS:
            names += f", ... ({len(self.sequence_ids)} in all)"
        if self.microbatch is None:
            return f"only together: rollouts {names} (several microbatches)"
        place = f"(data-parallel rank {self.data_parallel_rank}, microbatch {self.microbatch})"
        return f"rollout {names} {place}"


class NonFiniteError(FloatingPointError):
    """A loss or gradient norm that is not finite; nothing was changed by the update."""

    def __init__(self, message: str, culprits: tuple[Culprit, ...] = ()) -> None:
        """Keep the culprits beside the message that names them."""
        super().__init__(message, culprits)
        self.culprits = culprits

    def __str__(self) -> str:
        """Return the message."""
        return str(self.args[0])


def find_culprits(
    batch: PackedBatch, is_finite: Callable[[PackedBatch], bool]
) -> tuple[Culprit, ...]:
    """Return the smallest sets of sequences found that make the batch non-finite, at most 8.

    All ranks must call this; ``is_finite`` is collective and answers the same on every rank.

    Args:
        batch: known not to be finite.
        is_finite: runs loss and gradient of a batch.
    """
    found: list[Sequence[int]] = []

    def search(indices: Sequence[int]) -> None:
        if len(indices) == 1:
            found.append(indices)
            return
        middle = len(indices) // 2
        halves = (indices[:middle], indices[middle:])
        bad = [half for half in halves if not is_finite(only_sequences(batch, half))]
        if not bad:
            found.append(indices)
        for half in bad:
            if len(found) < _MAX_CULPRITS:
                search(half)

    search(range(batch.num_sequences))
    return tuple(_culprit(batch, indices) for indices in found)


def only_sequences(batch: PackedBatch, indices: Sequence[int]) -> PackedBatch:
    """Return the batch with the rows of these sequences only; streams and denominator stay."""
    wanted = np.asarray(indices, dtype=np.int32)
    return replace(batch, streams=tuple(_only_rows(stream, wanted) for stream in batch.streams))


def _only_rows(stream: Stream, wanted: np.ndarray) -> Stream:
    kept_R = np.isin(stream.sequence_index_R, wanted)
    return replace(
        stream,
        rows_R=stream.rows_R[kept_R],
        targets_R=stream.targets_R[kept_R],
        advantages_R=stream.advantages_R[kept_R],
        weights_R=stream.weights_R[kept_R],
        rollout_logprobs_R=stream.rollout_logprobs_R[kept_R],
        sequence_index_R=stream.sequence_index_R[kept_R],
    )


def _culprit(batch: PackedBatch, indices: Sequence[int]) -> Culprit:
    """Name sequences and where they were run."""
    places = {
        (position % batch.num_ranks, position // batch.num_ranks)
        for position, stream in enumerate(batch.streams)
        if np.isin(stream.sequence_index_R, np.asarray(indices)).any()
    }
    rank, microbatch = places.pop() if len(places) == 1 else (None, None)
    return Culprit(
        sequence_ids=tuple(batch.sequence_ids[index] for index in indices),
        data_parallel_rank=rank,
        microbatch=microbatch,
    )
