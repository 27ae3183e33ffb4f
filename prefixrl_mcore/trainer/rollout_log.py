"""Every verified rollout as a row of a Parquet table, one file per step."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefixrl_mcore.data.prompts import PromptRenderer
from prefixrl_mcore.trainer.generation import Generated

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("group_index", pa.int64()),
        ("rollout_index", pa.int64()),
        ("problem_id", pa.string()),
        ("prefixed_problem_id", pa.string()),
        ("trace_id", pa.string()),
        ("fraction", pa.float64()),
        ("answer", pa.string()),
        ("prompt_text", pa.string()),
        ("prefix_text", pa.string()),
        ("completion_text", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("prefix_token_ids", pa.list_(pa.int32())),
        ("completion_token_ids", pa.list_(pa.int32())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("reason", pa.string()),
        ("extracted", pa.string()),
        ("finish_reason", pa.string()),
        ("policy_version", pa.int64()),
        (
            "version_spans",
            pa.list_(pa.struct([("policy_version", pa.int64()), ("num_tokens", pa.int64())])),
        ),
        ("is_dropped", pa.bool_()),
    ]
)


def rollout_rows(step: int, rollouts: Generated, renderer: PromptRenderer) -> list[dict[str, Any]]:
    """Return one row per rollout with the columns of ``SCHEMA``; dropped groups come last."""
    rows: list[dict[str, Any]] = []
    for group_index, group in enumerate((*rollouts.groups, *rollouts.dropped)):
        start = group.prefixed_problem
        shared = {
            "step": step,
            "group_index": group_index,
            "is_dropped": group_index >= len(rollouts.groups),
            "problem_id": start.problem.problem_id,
            "prefixed_problem_id": start.prefixed_problem_id,
            "trace_id": start.trace_id,
            "fraction": start.fraction,
            "answer": start.problem.answer,
            "prompt_text": renderer.decode(start.prompt_token_ids),
            "prefix_text": renderer.decode(start.prefix_token_ids),
            "prompt_token_ids": list(start.prompt_token_ids),
            "prefix_token_ids": list(start.prefix_token_ids),
        }
        for index, (scored, advantage) in enumerate(
            zip(group.rollouts, group.advantages, strict=True)
        ):
            completion = scored.rollout.completion
            rows.append(
                shared
                | {
                    "rollout_index": index,
                    "completion_text": renderer.decode(completion.token_ids),
                    "completion_token_ids": list(completion.token_ids),
                    "rollout_logprobs": list(completion.logprobs),
                    "reward": scored.verdict.reward,
                    "advantage": advantage,
                    "reason": scored.verdict.reason,
                    "extracted": scored.verdict.extracted,
                    "finish_reason": completion.finish_reason,
                    "policy_version": completion.policy_version,
                    "version_spans": [asdict(span) for span in completion.version_spans],
                }
            )
    return rows


def write_rollouts(folder: Path, step: int, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of one step; the file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.parquet"
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), temporary)
    temporary.replace(path)
