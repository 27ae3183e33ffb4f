"""What made an update non-finite: named by rollout, rank and microbatch, and replayable."""

import dataclasses
import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from prefixrl_mcore.config.policy import LossConfig
from prefixrl_mcore.data.packing import PackedBatch
from prefixrl_mcore.data.repacking import repack
from prefixrl_mcore.policy.nonfinite import Culprit, NonFiniteError, find_culprits, only_sequences
from prefixrl_mcore.records import TrainingSequence
from prefixrl_mcore.trainer.dumps import Dump, dump_path, read_dump, write_dump
from prefixrl_mcore.trainer.replay import replay
from tests.support.policies import (
    VOCAB_SIZE,
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
    findings = policy.find_nonfinite(batch)
    assert (findings.culprits, findings.is_complete) == ((expected,), True)
    assert str(findings) == (
        f"made by rollout rollout-9 (data-parallel rank 0, microbatch {microbatch})"
    )
    assert max_difference(weights_of(policy), weights) == 0.0

    path = dump_path(tmp_path, 12)
    write_dump(path, 12, batch, raised.value, loss=None)
    assert path == tmp_path / "step-000012.json"
    again = replay(policy, read_dump(path))
    assert again is not None
    assert (str(again.error), again.findings) == (str(raised.value), findings)
    plain = replay(policy, Dump(batch=batch, loss=LossConfig()))  # which ignores these logprobs
    assert plain is None


def test_a_broken_activation_does_not_taint_the_rollouts_packed_beside_it(
    untied_folder: Path,
) -> None:
    """A weight that is finite, and overflows in whoever has this token (it is no logit's)."""
    rare = VOCAB_SIZE - 1
    sequences = [
        broken(
            sequence,
            context_token_ids=tuple(min(t, rare - 1) for t in sequence.context_token_ids),
            completion_token_ids=tuple(min(t, rare - 1) for t in sequence.completion_token_ids),
        )
        for sequence in make_sequences()
    ]
    sequences[5] = broken(sequences[5], context_token_ids=(rare, 4, 5))
    batch = make_batch(sequences)
    policy = build_policy(untied_folder)
    embedding = policy.model_chunks[0].module.embedding.word_embeddings.weight
    embedding.data[rare] = 3e38
    with pytest.raises(NonFiniteError):
        policy.update(batch)
    findings = policy.find_nonfinite(batch)
    assert [culprit.sequence_ids for culprit in findings.culprits] == [("rollout-5",)]


def test_a_gradient_too_large_behind_a_finite_loss_is_traced_to_its_rollouts(
    tied_folder: Path,
) -> None:
    sequences = make_sequences()
    for index in (2, 11):
        sequences[index] = broken(sequences[index], advantage=1e25)  # its square overflows
    policy = build_policy(tied_folder)
    batch = make_batch(sequences)
    with pytest.raises(NonFiniteError, match="gradient norm is inf"):
        policy.update(batch)
    culprits = policy.find_nonfinite(batch).culprits
    assert [c.sequence_ids for c in culprits] == [("rollout-2",), ("rollout-11",)]
    assert not policy.update(make_batch()).was_skipped  # and the policy is still usable


def test_broken_weights_are_blamed_before_any_rollout(tied_folder: Path) -> None:
    policy = build_policy(tied_folder)
    policy.model_chunks[0].module.decoder.final_layernorm.weight.data[0] = math.nan
    with pytest.raises(NonFiniteError):
        policy.update(make_batch())
    findings = policy.find_nonfinite(make_batch())
    assert (findings.culprits, findings.num_passes) == ((), 0)
    assert str(findings) == "the weights themselves are not finite"


def test_sequences_that_fail_only_together_are_named_together() -> None:
    batch = make_batch()

    def is_finite(part: PackedBatch) -> bool:
        left = {int(i) for stream in part.streams for i in stream.sequence_index_R}
        return not {1, 14} <= left

    findings = find_culprits(batch, is_finite)
    (culprit,) = findings.culprits
    assert (findings.num_passes, findings.is_complete) == (2, True)
    assert culprit.sequence_ids == batch.sequence_ids
    assert (culprit.data_parallel_rank, culprit.microbatch) == (None, None)
    assert "only together" in str(culprit)


def test_the_search_ends_when_its_passes_are_spent_and_says_so() -> None:
    batch = make_batch()  # 16 sequences: 2 log2(16) = 8 passes for one culprit

    def is_finite(part: PackedBatch) -> bool:
        left = {int(i) for stream in part.streams for i in stream.sequence_index_R}
        return not left & {1, 14}

    findings = find_culprits(batch, is_finite, max_passes=9)
    first, second = findings.culprits
    assert first.sequence_ids == ("rollout-1",)
    assert second.sequence_ids == tuple(f"rollout-{i}" for i in range(8, 16))
    assert "one or more of: rollouts rollout-8" in str(second)
    assert (findings.num_passes, findings.is_complete) == (8, False)
    assert "the search ended after 8 passes" in str(findings)
    assert find_culprits(batch, is_finite).num_passes == 14


def test_the_search_names_eight_culprits_at_most_and_says_so() -> None:
    findings = find_culprits(make_batch(), lambda _: False)
    assert len(findings.culprits) == 8
    assert not findings.is_complete


def test_a_part_of_a_batch_keeps_its_places_and_leaves_out_idle_microbatches() -> None:
    batch = make_batch(num_ranks=2, streams_multiple=2)
    index = 9
    rank, microbatch = place_of(batch, "rollout-9")
    part = only_sequences(batch, [index])
    assert len(part.streams) == 2
    whole, kept = batch.streams[2 * microbatch + rank], part.streams[rank]
    wanted_R = whole.sequence_index_R == index
    assert kept.rows_R.tolist() == whole.rows_R[wanted_R].tolist()
    same_T = kept.token_ids_T == whole.token_ids_T
    first, last = whole.rows_R[wanted_R][[0, -1]]
    assert same_T[first : last + 2].all()
    others_R = whole.rows_R[~wanted_R]
    assert not kept.token_ids_T[others_R].any()
    assert not part.streams[1 - rank].token_ids_T.any()
    assert len(only_sequences(batch, [index], microbatch_multiple=2).streams) == 4
    assert part.num_trained_tokens == batch.num_trained_tokens


def test_a_batch_packed_again_has_the_same_sequences_and_weights() -> None:
    batch = make_batch()
    weights = {i: 0.5 + i for i in range(16)}
    streams = tuple(
        dataclasses.replace(
            stream,
            weights_R=np.asarray([weights[int(i)] for i in stream.sequence_index_R], np.float32),
        )
        for stream in batch.streams
    )
    batch = dataclasses.replace(batch, streams=streams)
    again = repack(batch, stream_tokens=120, num_ranks=2, streams_multiple=2, sequence_multiple=4)
    expected = make_batch(stream_tokens=120, num_ranks=2, streams_multiple=2, sequence_multiple=4)
    assert len(again.streams) % 4 == 0
    assert rows_of(again) == rows_of(batch)
    assert again.sequence_ids == expected.sequence_ids
    assert again.num_trained_tokens == expected.num_trained_tokens
    assert again.has_rollout_logprobs
    for stream in again.streams:
        assert stream.weights_R.tolist() == [weights[int(i)] for i in stream.sequence_index_R]
        assert not np.any(np.diff(stream.sequence_starts) % 4)


def rows_of(batch: PackedBatch) -> set[tuple[int, int, int, float, float]]:
    """Every row as (sequence, token before, target, advantage, rollout logprob)."""
    return {
        (
            int(stream.sequence_index_R[i]),
            int(stream.token_ids_T[row]),
            int(stream.targets_R[i]),
            float(stream.advantages_R[i]),
            float(stream.rollout_logprobs_R[i]),
        )
        for stream in batch.streams
        for i, row in enumerate(stream.rows_R)
    }


def test_a_dump_keeps_every_array_of_the_batch(tmp_path: Path) -> None:
    batch = make_batch(num_ranks=2)
    path, loss = dump_path(tmp_path, 3), LossConfig(entropy_coefficient=0.5)
    write_dump(path, 3, batch, NonFiniteError("loss is nan"), loss=loss)
    dump = read_dump(path)
    assert dump.loss == loss
    read = dump.batch
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
    error = pickle.loads(pickle.dumps(NonFiniteError("loss is nan")))
    assert isinstance(error, FloatingPointError)
    assert str(error) == "loss is nan"
