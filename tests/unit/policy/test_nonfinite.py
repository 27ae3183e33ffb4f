"""What made an update non-finite: named by rollout, rank and microbatch, and replayable."""

import dataclasses
import math
import pickle
from pathlib import Path

import pytest

from prefixrl_mcore.config.policy import LossConfig
from prefixrl_mcore.data.packing import PackedBatch
from prefixrl_mcore.policy.nonfinite import Culprit, NonFiniteError, find_culprits
from prefixrl_mcore.records import TrainingSequence
from prefixrl_mcore.trainer.dumps import read_dump, replay, write_dump
from tests.support.policies import (
    build_policy,
    make_batch,
    make_sequences,
    max_difference,
    weights_of,
)


def broken(sequence: TrainingSequence, **changes: object) -> TrainingSequence:
    return dataclasses.replace(sequence, **changes)  # pyright: ignore[reportArgumentType]


def place_of(batch: PackedBatch, sequence_id: str) -> tuple[int, int]:
    index = batch.sequence_ids.index(sequence_id)
    (position,) = (i for i, stream in enumerate(batch.streams) if index in stream.sequence_index_R)
    return position % batch.num_ranks, position // batch.num_ranks


def test_a_rollout_with_a_broken_logprob_is_named_with_its_microbatch(
    tied_folder: Path, tmp_path: Path
) -> None:
    sequences = make_sequences()
    bad = sequences[9]
    logprobs = (*bad.rollout_logprobs[:-1], math.nan)
    sequences[9] = broken(bad, rollout_logprobs=logprobs)
    batch = make_batch(sequences)
    policy = build_policy(tied_folder, loss=LossConfig(importance="truncated"))
    weights = weights_of(policy)
    with pytest.raises(NonFiniteError, match="policy version 0: loss is nan") as raised:
        policy.update(batch)
    rank, microbatch = place_of(batch, "rollout-9")
    expected = Culprit(sequence_ids=("rollout-9",), data_parallel_rank=rank, microbatch=microbatch)
    assert raised.value.culprits == (expected,)
    place = f"rollout rollout-9 (data-parallel rank 0, microbatch {microbatch})"
    assert place in str(raised.value)
    assert max_difference(weights_of(policy), weights) == 0.0

    path = write_dump(tmp_path, 12, batch, raised.value)
    assert path == tmp_path / "step-000012.json"
    again = replay(policy, read_dump(path))
    assert again is not None
    assert (str(again), again.culprits) == (str(raised.value), raised.value.culprits)


def test_a_gradient_too_large_behind_a_finite_loss_is_traced_to_its_rollouts(
    tied_folder: Path,
) -> None:
    sequences = make_sequences()
    for index in (2, 11):
        sequences[index] = broken(sequences[index], advantage=1e25)  # its square overflows
    policy = build_policy(tied_folder)
    with pytest.raises(NonFiniteError, match="gradient norm is inf") as raised:
        policy.update(make_batch(sequences))
    assert [c.sequence_ids for c in raised.value.culprits] == [("rollout-2",), ("rollout-11",)]
    assert not policy.update(make_batch()).was_skipped  # and the policy is still usable


def test_broken_weights_are_blamed_before_any_rollout(tied_folder: Path) -> None:
    policy = build_policy(tied_folder)
    policy.model_chunks[0].module.decoder.final_layernorm.weight.data[0] = math.nan
    with pytest.raises(NonFiniteError, match="the weights themselves are not finite") as raised:
        policy.update(make_batch())
    assert raised.value.culprits == ()


def test_sequences_that_fail_only_together_are_named_together() -> None:
    batch = make_batch()

    def is_finite(part: PackedBatch) -> bool:
        left = {int(i) for stream in part.streams for i in stream.sequence_index_R}
        return not {1, 14} <= left

    (culprit,) = find_culprits(batch, is_finite)
    assert culprit.sequence_ids == batch.sequence_ids
    assert (culprit.data_parallel_rank, culprit.microbatch) == (None, None)
    assert "only together" in str(culprit)


def test_a_dump_keeps_every_array_of_the_batch(tmp_path: Path) -> None:
    batch = make_batch(num_ranks=2)
    read = read_dump(write_dump(tmp_path, 3, batch, NonFiniteError("loss is nan")))
    assert len(read.streams) == len(batch.streams)
    for ours, theirs in zip(batch.streams, read.streams, strict=True):
        for field in dataclasses.fields(ours):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            assert a.dtype == b.dtype
            assert a.tolist() == b.tolist()
    for field in dataclasses.fields(batch):
        if field.name != "streams":
            assert getattr(read, field.name) == getattr(batch, field.name)


def test_the_error_survives_pickling() -> None:
    culprit = Culprit(sequence_ids=("a",), data_parallel_rank=1, microbatch=2)
    error = pickle.loads(pickle.dumps(NonFiniteError("loss is nan", (culprit,))))
    assert isinstance(error, FloatingPointError)
    assert (str(error), error.culprits) == ("loss is nan", (culprit,))
