"""Finding what made a loss or gradient norm non-finite: a search over subsets of the batch.

Runs only when an update has failed, before anything was changed. Halves of the batch's sequences
are run again until single sequences are left, which finds a non-finite gradient behind a finite
loss as well. What is not under test does not take part: its rows are dropped, its tokens replaced
by padding, and microbatches without a sequence under test are left out, so that the passes get
shorter as the search narrows. The number of passes is limited.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prefixrl_mcore.data.packing import PADDING_TOKEN_ID, PackedBatch, Stream

MAX_PASSES = 64
"""Forward-backward passes of one search. One culprit among n takes at most 2 log2(n)."""

_MAX_CULPRITS = 8  # more say nothing more: then the weights or the whole batch are to blame


@dataclass(frozen=True, kw_only=True, slots=True)
class Culprit:
    """Sequences that make the update non-finite."""

    sequence_ids: tuple[str, ...]
    """Rollout ids; several if only together, or if the search did not narrow them down."""

    data_parallel_rank: int | None
    """Data-parallel rank that ran them; None if several did."""

    microbatch: int | None
    """Which of that rank's microbatches, from 0; None if several."""

    is_narrowed: bool = True
    """False if the search ended before it could tell which of several they are."""

    def __str__(self) -> str:
        """Return for example ``rollout 3/0/1 (data-parallel rank 0, microbatch 2)``."""
        names = ", ".join(self.sequence_ids[:_MAX_CULPRITS])
        if len(self.sequence_ids) > _MAX_CULPRITS:
            names += f", ... ({len(self.sequence_ids)} in all)"
        place = "several microbatches"
        if self.microbatch is not None:
            place = f"data-parallel rank {self.data_parallel_rank}, microbatch {self.microbatch}"
        if len(self.sequence_ids) == 1:
            return f"rollout {names} ({place})"
        what = "only together" if self.is_narrowed else "one or more of"
        return f"{what}: rollouts {names} ({place})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What is known of an update that was not finite."""

    has_finite_weights: bool
    """False if the weights themselves are to blame; nothing was searched then."""

    culprits: tuple[Culprit, ...] = ()
    """At most 8."""

    num_passes: int = 0
    """Forward-backward passes that the search took."""

    is_complete: bool = True
    """False if the limit of passes or of culprits ended the search."""

    def __str__(self) -> str:
        """Return one clause for an error message."""
        if not self.has_finite_weights:
            return "the weights themselves are not finite"
        text = "made by " + "; ".join(str(culprit) for culprit in self.culprits)
        if not self.is_complete:
            text += (
                f"; perhaps by others too: the search ended after {self.num_passes} passes and "
                f"{len(self.culprits)} findings (limits: {MAX_PASSES} and {_MAX_CULPRITS})"
            )
        return text


class NonFiniteError(FloatingPointError):
    """A loss or gradient norm that is not finite; nothing was changed by the update."""


def find_culprits(
    batch: PackedBatch,
    is_finite: Callable[[PackedBatch], bool],
    *,
    microbatch_multiple: int = 1,
    max_passes: int = MAX_PASSES,
) -> Findings:
    """Return the smallest sets of sequences found that make the batch non-finite, at most 8.

    All ranks must call this; ``is_finite`` is collective and answers the same on every rank.

    Args:
        batch: known not to be finite.
        is_finite: runs loss and gradient of a batch.
        microbatch_multiple: each rank runs a multiple of so many microbatches.
        max_passes: calls of ``is_finite`` at most.
    """
    search = _Search(batch, is_finite, microbatch_multiple, max_passes)
    search.run(range(batch.num_sequences))
    return Findings(
        has_finite_weights=True,
        culprits=tuple(search.found),
        num_passes=search.num_passes,
        is_complete=search.is_complete,
    )


class _Search:
    """Halves a set that is known to be bad, depth first: the first culprit is exact soon."""

    def __init__(
        self,
        batch: PackedBatch,
        is_finite: Callable[[PackedBatch], bool],
        microbatch_multiple: int,
        max_passes: int,
    ) -> None:
        self._batch = batch
        self._is_finite = is_finite
        self._multiple = microbatch_multiple
        self._max_passes = max_passes
        self.found: list[Culprit] = []
        self.num_passes = 0
        self.is_complete = True

    def run(self, indices: Sequence[int]) -> None:
        """Find the culprits among sequences that are not finite."""
        if len(self.found) == _MAX_CULPRITS:
            self.is_complete = False
            return
        if len(indices) == 1:
            self.found.append(_culprit(self._batch, indices))
            return
        if self.num_passes + 2 > self._max_passes:
            self.is_complete = False
            self.found.append(_culprit(self._batch, indices, is_narrowed=False))
            return
        middle = len(indices) // 2
        bad = [half for half in (indices[:middle], indices[middle:]) if not self._passes(half)]
        if not bad:
            self.found.append(_culprit(self._batch, indices))
        for half in bad:
            self.run(half)

    def _passes(self, indices: Sequence[int]) -> bool:
        self.num_passes += 1
        part = only_sequences(self._batch, indices, microbatch_multiple=self._multiple)
        return self._is_finite(part)


def only_sequences(
    batch: PackedBatch, indices: Sequence[int], *, microbatch_multiple: int = 1
) -> PackedBatch:
    """Return the batch with these sequences only, in their places.

    The reported loss keeps its denominator; the gradient is divided by the rows that are left.
    The other sequences lose their rows, and their tokens become padding. Microbatches in which no
    rank has a wanted sequence are left out, down to a multiple of ``microbatch_multiple``.
    """
    wanted = np.asarray(indices, dtype=np.int32)
    streams = [_only(stream, wanted) for stream in batch.streams]
    size = batch.num_ranks
    microbatches = [streams[first : first + size] for first in range(0, len(streams), size)]
    is_used = [any(stream.num_rows for stream in microbatch) for microbatch in microbatches]
    num_kept = -(-max(sum(is_used), 1) // microbatch_multiple) * microbatch_multiple
    order = sorted(range(len(microbatches)), key=lambda index: not is_used[index])  # stable
    kept = sorted(order[:num_kept])
    return replace(batch, streams=tuple(s for index in kept for s in microbatches[index]))


def _only(stream: Stream, wanted: np.ndarray) -> Stream:
    kept_R = np.isin(stream.sequence_index_R, wanted)
    token_ids_T = np.full_like(stream.token_ids_T, PADDING_TOKEN_ID)
    rows_R = stream.rows_R[kept_R]
    for first, last in itertools.pairwise(stream.sequence_starts):
        if np.any((rows_R >= first) & (rows_R < last)):
            token_ids_T[first:last] = stream.token_ids_T[first:last]
    return replace(
        stream,
        token_ids_T=token_ids_T,
        rows_R=rows_R,
        targets_R=stream.targets_R[kept_R],
        advantages_R=stream.advantages_R[kept_R],
        weights_R=stream.weights_R[kept_R],
        rollout_logprobs_R=stream.rollout_logprobs_R[kept_R],
        sequence_index_R=stream.sequence_index_R[kept_R],
    )


def _culprit(batch: PackedBatch, indices: Sequence[int], *, is_narrowed: bool = True) -> Culprit:
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
        is_narrowed=is_narrowed,
    )
