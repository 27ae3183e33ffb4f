"""Rollouts that no step has trained on yet, as JSON of a checkpoint; exact to the last bit.

A prefixed problem is stored by its id: the source, whose fingerprint a resumed run checks, has the
rest. Token ids are int32, logprobs float32 where that is exact (as all engines report them) and
float64 elsewhere, of little-endian bytes, compressed, in base64: a number as text would take twice
the room. Compression is the fastest there is, since rank 0 does it while all ranks wait.
"""

import base64
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from prefixrl_mcore.records import (
    Completion,
    Group,
    PrefixedProblem,
    Rollout,
    ScoredRollout,
    StartedGroup,
    Verdict,
    VersionSpan,
)
from prefixrl_mcore.trainer.generation import Generated

Find = Callable[[str], PrefixedProblem]
"""Returns the prefixed problem of an id; raises KeyError if there is none."""


def started_state(groups: Sequence[StartedGroup]) -> list[dict[str, Any]]:
    """Return groups that go on in a later step as JSON values."""
    return [
        {
            "group_id": group.group_id,
            "problem": group.prefixed_problem.prefixed_problem_id,
            "completions": [_completion_state(completion) for completion in group.completions],
        }
        for group in groups
    ]


def started_from(states: Sequence[dict[str, Any]], find: Find) -> list[StartedGroup]:
    """Return the groups of ``started_state``."""
    return [
        StartedGroup(
            group_id=state["group_id"],
            prefixed_problem=find(state["problem"]),
            completions=tuple(_completion_from(one) for one in state["completions"]),
        )
        for state in states
    ]


def generated_state(generated: Generated) -> dict[str, Any]:
    """Return what a step was given, and has not trained on, as JSON values."""
    groups = ("groups", "dropped")
    return {
        **{f.name: getattr(generated, f.name) for f in fields(Generated) if f.name not in groups},
        "groups": [_group_state(group) for group in generated.groups],
        "dropped": [_group_state(group) for group in generated.dropped],
    }


def generated_from(state: dict[str, Any], find: Find) -> Generated:
    """Return the rollouts of ``generated_state``."""
    values = dict(state)
    for name in ("groups", "dropped"):
        values[name] = tuple(_group_from(group, find) for group in state[name])
    return Generated(**values)


def _group_state(group: Group) -> dict[str, Any]:
    return {
        "problem": group.prefixed_problem.prefixed_problem_id,
        "advantages": list(group.advantages),
        "rollouts": [
            {
                "rollout_id": scored.rollout.rollout_id,
                "completion": _completion_state(scored.rollout.completion),
                "verdict": asdict(scored.verdict),
            }
            for scored in group.rollouts
        ],
    }


def _group_from(state: dict[str, Any], find: Find) -> Group:
    prefixed_problem = find(state["problem"])
    return Group(
        prefixed_problem=prefixed_problem,
        advantages=tuple(state["advantages"]),
        rollouts=tuple(
            ScoredRollout(
                rollout=Rollout(
                    rollout_id=scored["rollout_id"],
                    prefixed_problem=prefixed_problem,
                    completion=_completion_from(scored["completion"]),
                ),
                verdict=Verdict(**scored["verdict"]),
            )
            for scored in state["rollouts"]
        ),
    )


def _completion_state(completion: Completion) -> dict[str, Any]:
    return {
        "token_ids": _packed(np.asarray(completion.token_ids, "<i4")),
        "logprobs": _packed(_narrowed(np.asarray(completion.logprobs, "<f8"))),
        "finish_reason": completion.finish_reason,
        "policy_version": completion.policy_version,
        "earlier_spans": [[s.policy_version, s.num_tokens] for s in completion.earlier_spans],
        "num_cached_tokens": completion.num_cached_tokens,
    }


def _completion_from(state: dict[str, Any]) -> Completion:
    token_ids = np.frombuffer(_unpacked(state["token_ids"]), "<i4")
    logprobs = _unpacked(state["logprobs"])
    dtype = "<f4" if len(logprobs) == token_ids.nbytes else "<f8"
    return Completion(
        token_ids=tuple(token_ids.tolist()),
        logprobs=tuple(np.frombuffer(logprobs, dtype).tolist()),
        finish_reason=state["finish_reason"],
        policy_version=state["policy_version"],
        earlier_spans=tuple(
            VersionSpan(policy_version=version, num_tokens=number)
            for version, number in state["earlier_spans"]
        ),
        num_cached_tokens=state["num_cached_tokens"],
    )


def _narrowed(values: np.ndarray) -> np.ndarray:
    """Return float64 values as float32 if that loses nothing."""
    with np.errstate(over="ignore"):
        narrow = values.astype("<f4")
    return narrow if np.array_equal(narrow.astype("<f8"), values) else values


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), level=1)).decode("ascii")


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))
