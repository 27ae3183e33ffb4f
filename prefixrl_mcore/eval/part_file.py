"""The part under way of ``prefixrl eval``: a line per problem, kept while others are sampled.

The first line says of what the results are: settings, part, and a digest of everything that is
sampled from. Results of anything else are not taken. A line that a kill left half-written is the
last one, and is dropped; any other that is no result stops the evaluation.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.eval.runner import StartResult, StartResults
from prefixrl_mcore.observability.atomic import write_text_atomic
from prefixrl_mcore.records import PrefixedProblem

logger = logging.getLogger(__name__)

_OF_A_PART = ("part", "samples_per_start", "starts")
"""What parts of one evaluation differ in."""


class PartFile:
    """Results of one part, appended while it is evaluated; one process writes at a time."""

    def __init__(
        self,
        path: Path,
        *,
        settings: dict[str, Any],
        label: str,
        starts: Sequence[PrefixedProblem],
        num_samples: int,
    ) -> None:
        """Read what an interrupted evaluation has left of the part, or begin the file.

        Args:
            path: the file; of the part under way, whichever that is.
            settings: of the evaluation, as JSON values.
            label: the part.
            starts: what it samples from.
            num_samples: completions of each.

        Raises:
            ConfigError: if a line other than a half-written last one is no result of the part.
        """
        self._path = path
        self._num_starts, self._num_samples = len(starts), num_samples
        self.starts_hash = hash_starts(starts)
        """Of what the part samples from."""
        of_part = (label, num_samples, self.starts_hash)
        identity = settings | dict(zip(_OF_A_PART, of_part, strict=True))
        self.results: dict[int, StartResult] = {}
        """Index of a start → what came of it, of those that are done."""
        if path.exists() and self._is_of(identity):
            self._read(label)
        else:
            write_text_atomic(path, json.dumps(identity) + "\n")

    def append(self, results: StartResults) -> None:
        """Add results; they are on disk when this returns."""
        lines = [json.dumps({"index": index} | asdict(one)) for index, one in results.items()]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self.results.update(results)

    def remove(self) -> None:
        """Forget the part: it is complete, and kept elsewhere."""
        self._path.unlink()

    def _is_of(self, identity: dict[str, Any]) -> bool:
        """Return whether the file holds results of this; say so if results are lost by that.

        Raises:
            ConfigError: if its first line is no JSON object: it was written as a whole.
        """
        first, *rest = self._path.read_bytes().split(b"\n")
        found = _object(first)
        if found is None:
            raise self._damaged(1)
        differing = differing_keys(found, identity)
        is_of_finished_part = "part" in differing and set(differing) <= set(_OF_A_PART)
        if differing and len(rest) > 1 and not is_of_finished_part:
            logger.warning(
                "%s: %d results of part %s are not used here (other %s)",
                *(self._path, len(rest) - 1, found.get("part"), ", ".join(differing)),
            )
        return not differing

    def _read(self, label: str) -> None:
        """Take the results that are there, and cut off a half-written last one.

        Raises:
            ConfigError: if another line is no result.
        """
        _, *lines, torn = self._path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=2):
            values = _object(line)
            if values is None or not self._is_result(values):
                raise self._damaged(number)
            index = values.pop("index")
            self.results[index] = StartResult(**values)
        if torn:
            os.truncate(self._path, self._path.stat().st_size - len(torn))
            logger.info("%s: a half-written result was dropped; it is made again", self._path)
        if self.results:
            logger.info(
                "%s: continuing part %s, %d of %d problems are done",
                *(self._path, label, len(self.results), self._num_starts),
            )

    def _is_result(self, values: dict[str, Any]) -> bool:
        """Return whether these are the fields of a result, within their limits."""
        limits = {
            "index": self._num_starts - 1,
            "num_correct": self._num_samples,
            "completion_tokens": None,
        }
        return values.keys() == limits.keys() and all(
            type(values[key]) is int and values[key] >= 0 and (top is None or values[key] <= top)
            for key, top in limits.items()
        )

    def _damaged(self, line: int) -> ConfigError:
        return ConfigError(
            f"{self._path}, line {line}: expected a result of an evaluation under way, found "
            "something else: the file is damaged; remove it, and the part is evaluated anew"
        )


def _object(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line, or None if there is none."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def differing_keys(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return the keys in which two records differ, sorted.

    Args:
        found: as it was read from JSON.
        expected: as it would be written; tuples are lists in JSON.
    """
    return [
        key
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != json.loads(json.dumps(expected.get(key)))
    ]


def hash_starts(starts: Sequence[PrefixedProblem]) -> str:
    """Return the SHA-256 of contexts and answers, in their order."""
    digest = hashlib.sha256()
    for start in starts:
        content = [start.prefixed_problem_id, start.problem.answer, start.context_token_ids]
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()
