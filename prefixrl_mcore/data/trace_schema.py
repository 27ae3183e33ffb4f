"""The records of a trace store, and their Parquet columns."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa

from prefixrl_mcore.records import FinishReason, Trace

FORMAT_VERSION = 1
"""Layout version of the store; a store of another version is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRecord:
    """One verified trace with everything that is known about its origin and cost."""

    trace_id: str
    """Unique in the store; ``build_trace_id`` makes it from the content."""

    problem_id: str
    """The problem that the trace answers."""

    prompt_token_ids: tuple[int, ...]
    """[num_prompt_tokens] not empty."""

    completion_token_ids: tuple[int, ...]
    """[num_completion_tokens] not empty; the end token is included when one was sampled."""

    rollout_logprobs: tuple[float, ...]
    """[num_completion_tokens] nats, at ``temperature``; empty when the sampler reported none."""

    finish_reason: FinishReason
    """Why the completion ended."""

    sampler: str
    """Engine with version, or ``import``."""

    source_model: str
    """Name of the weights that wrote the trace; for imports, the other model."""

    policy_version: int
    """Optimizer steps applied to those weights; -1 for the engine's initial weights and imports."""

    weights_hash: str
    """``digest_of_weights`` of their folder; empty when unknown."""

    temperature: float | None
    """Sampling temperature; None when unknown."""

    seed: int | None
    """Seed of the request; None when unknown."""

    verifier: str
    """Name and version of the verifier that accepted the trace."""

    tokenizer_hash: str
    """Hash of the tokenizer that the token ids belong to."""

    chat_template_hash: str
    """Hash of the template and prompt settings that made the prompt."""

    num_tries: int
    """Attempts at the problem until this trace was accepted, itself included."""

    flops: float
    """FLOPs of those attempts, failed ones included."""

    seconds: float
    """Wall time of those attempts, shared between the problems of a round."""

    label: bool | None = None
    """Correctness as labelled by the origin of an imported trace; None without a label."""

    def __post_init__(self) -> None:
        """Refuse records that could not be used."""
        name = f"trace {self.trace_id!r}"
        if not self.trace_id or not self.problem_id:
            raise ValueError(f"{name}: trace_id and problem_id must not be empty")
        if not self.prompt_token_ids or not self.completion_token_ids:
            raise ValueError(
                f"{name}: {len(self.prompt_token_ids)} prompt and "
                f"{len(self.completion_token_ids)} completion tokens; both must be at least 1"
            )
        if len(self.rollout_logprobs) not in (0, len(self.completion_token_ids)):
            raise ValueError(
                f"{name}: {len(self.completion_token_ids)} completion tokens but "
                f"{len(self.rollout_logprobs)} rollout logprobs"
            )

    def as_trace(self) -> Trace:
        """Return the part that prefixes are cut from."""
        return Trace(
            trace_id=self.trace_id,
            problem_id=self.problem_id,
            prompt_token_ids=self.prompt_token_ids,
            completion_token_ids=self.completion_token_ids,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptRecord:
    """What was spent on one problem, whether or not it was solved."""

    problem_id: str
    """The problem."""

    num_tries: int
    """Completions that were sampled or examined."""

    num_tokens: int
    """Prompt and completion tokens of those completions: the D of 2ND."""

    flops: float
    """FLOPs charged for them."""

    seconds: float
    """Wall time, shared between the problems of a round."""

    is_solved: bool
    """A verified trace was found."""

    origin: str = ""
    """Empty for rejection sampling; ``<file name> sha256:<hex digest>`` for an imported file."""


TRACE_SCHEMA = pa.schema(
    [
        pa.field("trace_id", pa.string(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("completion_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("rollout_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("sampler", pa.string(), nullable=False),
        pa.field("source_model", pa.string(), nullable=False),
        pa.field("policy_version", pa.int64(), nullable=False),
        pa.field("weights_hash", pa.string(), nullable=False),
        pa.field("temperature", pa.float64()),
        pa.field("seed", pa.int64()),
        pa.field("verifier", pa.string(), nullable=False),
        pa.field("tokenizer_hash", pa.string(), nullable=False),
        pa.field("chat_template_hash", pa.string(), nullable=False),
        pa.field("num_tries", pa.int64(), nullable=False),
        pa.field("flops", pa.float64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("label", pa.bool_()),
    ]
)

ATTEMPT_SCHEMA = pa.schema(
    [
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("num_tries", pa.int64(), nullable=False),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("flops", pa.float64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("is_solved", pa.bool_(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
    ]
)


def to_table(
    records: Sequence[TraceRecord] | Sequence[AttemptRecord], schema: pa.Schema
) -> pa.Table:
    """Return records as a table whose columns are the record's fields."""
    columns = {name: [getattr(record, name) for record in records] for name in schema.names}
    return pa.table(columns, schema=schema)


def traces_from_table(table: pa.Table) -> list[TraceRecord]:
    """Return the rows of a table of ``TRACE_SCHEMA``."""
    return [TraceRecord(**_tuples(row)) for row in table.to_pylist()]


def attempts_from_table(table: pa.Table) -> list[AttemptRecord]:
    """Return the rows of a table of ``ATTEMPT_SCHEMA``."""
    return [AttemptRecord(**row) for row in table.to_pylist()]


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    """Turn lists into tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


def merge_attempts(attempts: Sequence[AttemptRecord]) -> list[AttemptRecord]:
    """Return one record per problem, costs added up, in the order of first appearance.

    ``origin`` is empty where the attempts came from different places.
    """
    merged: dict[str, AttemptRecord] = {}
    for attempt in attempts:
        known = merged.get(attempt.problem_id)
        if known is None:
            merged[attempt.problem_id] = attempt
            continue
        merged[attempt.problem_id] = AttemptRecord(
            problem_id=attempt.problem_id,
            num_tries=known.num_tries + attempt.num_tries,
            num_tokens=known.num_tokens + attempt.num_tokens,
            flops=known.flops + attempt.flops,
            seconds=known.seconds + attempt.seconds,
            is_solved=known.is_solved or attempt.is_solved,
            origin=known.origin if known.origin == attempt.origin else "",
        )
    return list(merged.values())


assert [f.name for f in fields(TraceRecord)] == TRACE_SCHEMA.names, "trace columns differ"
assert [f.name for f in fields(AttemptRecord)] == ATTEMPT_SCHEMA.names, "attempt columns differ"
