"""The trace store: verified traces with their origin, and what every problem cost.

Layout of the folder::

    store.json                          header: tokenizer and template hashes, who made it
    part-000000/traces.parquet          traces of one round, or of what of it was finished first
    part-000000/attempts.parquet        cost of that, for every problem tried in it
    part-000001/...

A part appears by one rename after everything in it is on disk, so one that was interrupted does
not exist. Parts are never changed. One process writes at a time; others may read.
"""

import collections
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from prefixrl_mcore.data.trace_schema import (
    ATTEMPT_SCHEMA,
    FORMAT_VERSION,
    TRACE_SCHEMA,
    AttemptRecord,
    TraceRecord,
    attempts_from_table,
    merge_attempts,
    to_table,
    traces_from_table,
)
from prefixrl_mcore.observability.atomic import write_folder_atomic, write_json_atomic
from prefixrl_mcore.records import Trace

_logger = logging.getLogger(__name__)

_HEADER = "store.json"
_TRACES = "traces.parquet"
_ATTEMPTS = "attempts.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreHeader:
    """What all traces of a store have in common."""

    tokenizer_hash: str
    """SHA-256 of the tokenizer's content; every token id belongs to it."""

    chat_template_hash: str
    """SHA-256 of the template and prompt settings; every prompt was made by them."""

    model: str
    """Name or folder of the model whose tokenizer this is; information only."""

    created: float
    """Unix seconds; information only."""

    format_version: int = FORMAT_VERSION
    """Layout version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStats:
    """Totals of a store."""

    num_traces: int
    """Verified traces."""

    num_problems: int
    """Problems that were tried."""

    num_solved: int
    """Problems with at least one trace."""

    num_tries: int
    """Attempts at all problems."""

    max_tries: int
    """Most attempts at one problem."""

    num_tokens: int
    """Prompt and completion tokens of all attempts."""

    flops: float
    """FLOPs of all attempts, unsolved problems included."""

    seconds: float
    """Wall time of all attempts."""

    completion_tokens_min: int
    """Shortest trace, tokens; 0 without traces."""

    completion_tokens_mean: float
    """Mean length of a trace, tokens; 0 without traces."""

    completion_tokens_max: int
    """Longest trace, tokens; 0 without traces."""

    finish_reasons: dict[str, int]
    """Finish reason -> traces."""

    samplers: dict[str, int]
    """``<sampler> <source model>`` -> traces."""

    verifiers: dict[str, int]
    """Verifier -> traces."""


def build_trace_id(problem_id: str, completion_token_ids: Sequence[int]) -> str:
    """Return ``<problem_id>:<first 12 hex digits of the SHA-256 of the token ids>``.

    The id depends on the content only, so that equal completions of a problem have equal ids and
    an interrupted import can be repeated.
    """
    content = ",".join(map(str, completion_token_ids)).encode()
    return f"{problem_id}:{hashlib.sha256(content).hexdigest()[:12]}"


class TraceStore:
    """An append-only store; see the module's docstring for its layout."""

    def __init__(self, folder: Path, header: StoreHeader) -> None:
        """Use ``create``, ``open`` or ``open_or_create``."""
        self.folder = folder
        """The store's folder."""
        self.header = header
        """What all traces have in common."""
        self._known_ids: set[str] | None = None
        self._round_attempts: list[list[AttemptRecord]] = []

    @classmethod
    def create(
        cls, folder: Path, *, tokenizer_hash: str, chat_template_hash: str, model: str
    ) -> Self:
        """Make an empty store.

        Raises:
            ValueError: if the folder holds a store or anything else.
        """
        if folder.exists() and any(not p.name.startswith(".tmp-") for p in folder.iterdir()):
            raise ValueError(
                f"trace store {folder}: the folder is not empty; choose another data.traces, or "
                "open the store in it"
            )
        header = StoreHeader(
            tokenizer_hash=tokenizer_hash,
            chat_template_hash=chat_template_hash,
            model=model,
            created=time.time(),
        )
        write_json_atomic(folder / _HEADER, asdict(header))
        return cls(folder, header)

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Return whether a folder is a trace store, of any kind."""
        return (folder / _HEADER).exists()

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        tokenizer_hash: str | None = None,
        chat_template_hash: str | None = None,
    ) -> Self:
        """Open a store for reading and appending.

        Args:
            folder: the store.
            tokenizer_hash: the hash that the store must have; None accepts any (inspection only).
            chat_template_hash: the hash that the store must have; None accepts any.

        Raises:
            ValueError: if there is no store, its header is damaged or of another format, or a
                hash differs.
        """
        header = _read_header(folder)
        check_hash("tokenizer", folder, header.tokenizer_hash, tokenizer_hash)
        check_hash("chat template", folder, header.chat_template_hash, chat_template_hash)
        return cls(folder, header)

    @classmethod
    def open_or_create(
        cls, folder: Path, *, tokenizer_hash: str, chat_template_hash: str, model: str
    ) -> Self:
        """Open the store if there is one with these hashes, make it if there is none.

        Raises:
            ValueError: as ``open`` and ``create``.
        """
        if cls.is_in(folder):
            return cls.open(
                folder, tokenizer_hash=tokenizer_hash, chat_template_hash=chat_template_hash
            )
        return cls.create(
            folder,
            tokenizer_hash=tokenizer_hash,
            chat_template_hash=chat_template_hash,
            model=model,
        )

    def append(self, traces: Sequence[TraceRecord], attempts: Sequence[AttemptRecord]) -> None:
        """Add one round, all of it or nothing; it is on disk when this returns.

        Args:
            traces: verified traces of the round; may be empty.
            attempts: what the round added to the cost of each problem tried in it.

        Raises:
            ValueError: if a trace id is known, a trace has other hashes than the store, or a
                trace's problem has no attempt in the round.
            RuntimeError: if another process has added the same part meanwhile.
        """
        if not traces and not attempts:
            return
        known_ids = self._load_known_ids()
        self._check_traces(traces, attempts, known_ids)
        number = len(self._parts())
        part = self.folder / f"part-{number:06d}"
        temporary = self.folder / f".tmp-part-{number:06d}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        trace_table = to_table(traces, TRACE_SCHEMA)
        attempt_table = to_table(attempts, ATTEMPT_SCHEMA)
        try:
            write_folder_atomic(
                part,
                temporary,
                {
                    _TRACES: lambda path: _write_table(trace_table, path),
                    _ATTEMPTS: lambda path: _write_table(attempt_table, path),
                },
            )
        except (FileExistsError, FileNotFoundError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RuntimeError(
                f"trace store {self.folder}: another process writes to it or has removed it "
                f"({error}); stop one of them; this round was not stored"
            ) from error
        known_ids.update(trace.trace_id for trace in traces)
        self._remove_leftovers(number)

    def traces(self) -> Iterator[TraceRecord]:
        """Yield all traces in the order in which they were added.

        Raises:
            ValueError: if a part is damaged.
        """
        for part in self._parts():
            yield from traces_from_table(_read_table(part / _TRACES, TRACE_SCHEMA))

    def first_traces(self) -> dict[str, Trace]:
        """Return problem id → the trace of it that was added first: the one that is used.

        Raises:
            ValueError: if a part is damaged.
        """
        first: dict[str, Trace] = {}
        for record in self.traces():
            if record.problem_id not in first:
                first[record.problem_id] = record.as_trace()
        return first

    def attempts(self) -> list[AttemptRecord]:
        """Return one record per problem that was tried, with its whole cost.

        Raises:
            ValueError: if a part is damaged.
        """
        return merge_attempts(list(self._attempts_by_round()))

    def origins(self) -> set[str]:
        """Return the files that were imported, as ``AttemptRecord.origin`` names them."""
        return {attempt.origin for attempt in self._attempts_by_round()} - {""}

    def total_flops(self) -> float:
        """Return the FLOPs of all attempts, those at unsolved problems included."""
        return sum(attempt.flops for attempt in self.attempts())

    def stats(self) -> StoreStats:
        """Return totals; reads the whole store."""
        traces = list(self.traces())
        attempts = self.attempts()
        lengths = [len(trace.completion_token_ids) for trace in traces]
        count = collections.Counter
        return StoreStats(
            num_traces=len(traces),
            num_problems=len(attempts),
            num_solved=sum(attempt.is_solved for attempt in attempts),
            num_tries=sum(attempt.num_tries for attempt in attempts),
            max_tries=max((attempt.num_tries for attempt in attempts), default=0),
            num_tokens=sum(attempt.num_tokens for attempt in attempts),
            flops=sum(attempt.flops for attempt in attempts),
            seconds=sum(attempt.seconds for attempt in attempts),
            completion_tokens_min=min(lengths, default=0),
            completion_tokens_mean=sum(lengths) / len(lengths) if lengths else 0.0,
            completion_tokens_max=max(lengths, default=0),
            finish_reasons=dict(count(trace.finish_reason for trace in traces)),
            samplers=dict(count(f"{trace.sampler} {trace.source_model}" for trace in traces)),
            verifiers=dict(count(trace.verifier for trace in traces)),
        )

    def _attempts_by_round(self) -> Iterator[AttemptRecord]:
        """Yield the attempts of every part as they were added; each part is read once."""
        parts = self._parts()
        for part in parts[len(self._round_attempts) :]:
            table = _read_table(part / _ATTEMPTS, ATTEMPT_SCHEMA)
            self._round_attempts.append(attempts_from_table(table))
        for attempts in self._round_attempts:
            yield from attempts

    def _parts(self) -> list[Path]:
        """Return the parts in order; refuse a gap, which means that files were lost."""
        parts = sorted(self.folder.glob("part-*"))
        for number, part in enumerate(parts):
            if part.name != f"part-{number:06d}":
                raise ValueError(
                    f"trace store {self.folder}: expected part-{number:06d}, found {part.name}; "
                    "parts were removed or renamed; restore them from a copy"
                )
        return parts

    def _load_known_ids(self) -> set[str]:
        """Return the trace ids of the store; read once."""
        if self._known_ids is None:
            self._known_ids = {
                trace_id
                for part in self._parts()
                for trace_id in _read_table(part / _TRACES, TRACE_SCHEMA)["trace_id"].to_pylist()
            }
        return self._known_ids

    def _check_traces(
        self,
        traces: Sequence[TraceRecord],
        attempts: Sequence[AttemptRecord],
        known_ids: set[str],
    ) -> None:
        """Refuse traces that do not belong into this store."""
        new_ids: set[str] = set()
        tried = {attempt.problem_id for attempt in attempts}
        for trace in traces:
            if trace.trace_id in known_ids or trace.trace_id in new_ids:
                raise ValueError(
                    f"trace {trace.trace_id!r}: is already in the store {self.folder}; trace ids "
                    "must be unique"
                )
            new_ids.add(trace.trace_id)
            if trace.problem_id not in tried:
                raise ValueError(
                    f"trace {trace.trace_id!r}: problem {trace.problem_id!r} has no attempt in "
                    "the same round; record its cost together with the trace"
                )
            where = self.folder / trace.trace_id
            check_hash("tokenizer", where, trace.tokenizer_hash, self.header.tokenizer_hash)
            check_hash(
                "chat template", where, trace.chat_template_hash, self.header.chat_template_hash
            )

    def _remove_leftovers(self, number: int) -> None:
        """Remove what killed writers left of parts that exist by now."""
        for leftover in self.folder.glob(".tmp-part-*"):
            if leftover.name[len(".tmp-part-") :][:6] <= f"{number:06d}":
                _logger.info("trace store: removing %s of an interrupted run", leftover.name)
                shutil.rmtree(leftover, ignore_errors=True)


def check_hash(what: str, where: Path, found: str, expected: str | None) -> None:
    """Refuse data made with another tokenizer or template.

    Raises:
        ValueError: with both hashes, if they differ; None expects nothing.
    """
    if expected is not None and found != expected:
        raise ValueError(
            f"{where}: was made with {what} {found}, this run has {expected}; its token ids mean "
            "something else here; use the same model.path and data.prompt, or collect again"
        )


def _read_header(folder: Path) -> StoreHeader:
    """Read and check ``store.json``."""
    path = folder / _HEADER
    if not path.is_file():
        raise ValueError(
            f"trace store {folder}: does not exist; run `prefixrl collect` or `prefixrl traces "
            "import` first, or correct data.traces"
        )
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: has format version {version}, this program reads {FORMAT_VERSION}; "
                "use the version that wrote it"
            )
        return StoreHeader(**{field.name: values[field.name] for field in fields(StoreHeader)})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged header: {error!r}; restore it from a copy") from None


def _write_table(table: pa.Table, path: Path) -> None:
    """Write a compressed Parquet file with page checksums."""
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a Parquet file, checking checksums and columns."""
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        return table.select(schema.names).cast(schema)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ValueError(
            f"{path}: damaged or incomplete: {error}; restore it from a copy"
        ) from None
