"""What must not matter to the gradient: prompts and prefixes as targets, packing, neighbours."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from prefixrl_mcore.config.policy import LossConfig
from prefixrl_mcore.data.packing import PackedBatch
from tests.support.apart import assert_sequences_are_apart
from tests.support.masked_rows import with_every_position_a_row
from tests.support.policies import (
    build_policy,
    gradients_of,
    make_batch,
    make_sequences,
    max_difference,
)

TOLERANCE = 2e-6
"""float32: other orders of summation; the gradients' largest entries are of size 0.1 to 1."""


def _gradients(folder: Path, batch: PackedBatch, **settings: object) -> dict[str, Tensor]:
    policy = build_policy(folder, **settings)
    policy.update(batch)
    return gradients_of(policy)


def _masked_gradients(
    folder: Path, batch: PackedBatch, *, garbage: float, garbage_target: int
) -> dict[str, Tensor]:
    masked = with_every_position_a_row(batch, garbage=garbage, garbage_target=garbage_target)
    return _gradients(folder, masked)


def test_targets_and_loss_inputs_of_prompt_and_prefix_have_exactly_no_effect(
    tied_folder: Path,
) -> None:
    batch = make_batch()
    clean = _masked_gradients(tied_folder, batch, garbage=0.0, garbage_target=0)
    dirty = _masked_gradients(tied_folder, batch, garbage=1e6, garbage_target=17)
    assert max_difference(clean, dirty) == 0.0
    # The mask and the selection of rows are the same loss, but for the count that divides it.
    num_positions = sum(len(stream.token_ids_T) for stream in batch.streams)
    selected = _gradients(tied_folder, batch)
    scaled = {name: g * (num_positions / batch.num_trained_tokens) for name, g in clean.items()}
    assert max_difference(scaled, selected) < TOLERANCE
    assert max(float(g.abs().max()) for g in selected.values()) > 0.05


def test_only_completion_tokens_are_rows_and_targets(tied_folder: Path) -> None:
    sequences = make_sequences()
    batch = make_batch(sequences)
    by_id = {sequence.sequence_id: sequence for sequence in sequences}
    for stream in batch.streams:
        for row, target, index in zip(
            stream.rows_R, stream.targets_R, stream.sequence_index_R, strict=True
        ):
            sequence = by_id[batch.sequence_ids[index]]
            in_completion = stream.position_ids_T[row] + 1 - len(sequence.context_token_ids)
            assert sequence.completion_token_ids[in_completion] == target


@pytest.mark.parametrize("seed", [1, 2])
def test_gradient_does_not_depend_on_packing_order_or_microbatches(
    tied_folder: Path, seed: int
) -> None:
    sequences = make_sequences()
    expected = _gradients(tied_folder, make_batch(sequences))
    shuffled = [sequences[i] for i in np.random.default_rng(seed).permutation(len(sequences))]
    for stream_tokens in (40, 64, 512):
        batch = make_batch(shuffled, stream_tokens=stream_tokens, streams_multiple=seed)
        gradients = _gradients(tied_folder, batch, stream_tokens=stream_tokens)
        assert max_difference(gradients, expected) < TOLERANCE
    reversed_streams = make_batch(shuffled, stream_tokens=40)
    reversed_streams = dataclasses.replace(reversed_streams, streams=reversed_streams.streams[::-1])
    gradients = _gradients(tied_folder, reversed_streams, stream_tokens=40)
    assert max_difference(gradients, expected) < TOLERANCE


def test_filler_streams_change_nothing(tied_folder: Path) -> None:
    sequences = make_sequences(2)
    expected = _gradients(tied_folder, make_batch(sequences))
    batch = make_batch(sequences, streams_multiple=3)
    assert [stream.num_rows > 0 for stream in batch.streams] == [True, False, False]
    assert max_difference(_gradients(tied_folder, batch), expected) < TOLERANCE


def test_a_sequence_sees_no_other_sequence_in_the_stream(tied_folder: Path) -> None:
    """The gradient of one sequence's logprobs reaches its own token embeddings only."""
    assert_sequences_are_apart(build_policy(tied_folder), make_batch().streams[0])


def test_rollout_logprobs_do_not_enter_reinforce(tied_folder: Path) -> None:
    batch = make_batch()
    changed = dataclasses.replace(
        batch,
        streams=tuple(
            dataclasses.replace(s, rollout_logprobs_R=s.rollout_logprobs_R - 1.0)
            for s in batch.streams
        ),
    )
    plain = _gradients(tied_folder, batch)
    assert max_difference(plain, _gradients(tied_folder, changed)) == 0.0
    truncated = LossConfig(importance="truncated", max_importance=5.0)
    weighted = _gradients(tied_folder, changed, loss=truncated)
    assert max_difference(plain, weighted) > 1e-3
