"""What the supervised phase makes of a trace store, before there is a policy."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.data.traces import AttemptRecord, TraceRecord, TraceStore, build_trace_id
from prefixrl_mcore.records import Trace
from prefixrl_mcore.trainer.build import read_sft_traces
from prefixrl_mcore.trainer.sft import split_traces

HASHES = {"tokenizer_hash": "t" * 64, "chat_template_hash": "c" * 64}
RENDERER: Any = SimpleNamespace(**HASHES)


def trace(number: int) -> TraceRecord:
    problem_id, completion = f"p{number}", (number, 9)
    return TraceRecord(
        trace_id=build_trace_id(problem_id, completion),
        problem_id=problem_id,
        prompt_token_ids=(1, 2),
        completion_token_ids=completion,
        rollout_logprobs=(),
        finish_reason="stop",
        sampler="fake",
        source_model="tiny",
        policy_version=-1,
        weights_hash="",
        temperature=1.0,
        seed=0,
        verifier="fake",
        num_tries=1,
        flops=1.0,
        seconds=0.5,
        **HASHES,
    )


def attempt(number: int) -> AttemptRecord:
    return AttemptRecord(
        problem_id=f"p{number}", num_tries=1, num_tokens=4, flops=1.0, seconds=0.5, is_solved=True
    )


def write_store(folder: Path, parts: Sequence[Sequence[int]]) -> None:
    """Write one part for each sequence of problem numbers."""
    store = TraceStore.create(folder, **HASHES, model="tiny")
    for numbers in parts:
        store.append([trace(n) for n in numbers], [attempt(n) for n in numbers])


def config(folder: Path, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "method": "sft_then_rl",
            "run_folder": folder / "run",
            "model": {"path": folder / "model"},
            "data": {"problems": folder / "p.jsonl", "traces": folder},
            **changes,
        }
    )


def test_what_is_held_back_does_not_depend_on_when_each_trace_was_found(tmp_path: Path) -> None:
    def split(name: str, parts: Sequence[Sequence[int]]) -> tuple[list[Trace], list[Trace]]:
        write_store(tmp_path / name, parts)
        traces = read_sft_traces(config(tmp_path / name), RENDERER)
        return split_traces(traces, 0.2, seed=0)

    undisturbed = split("undisturbed", [range(10)])
    killed_once = split("killed", [[3, 7, 4], [0, 1, 9], [2, 5, 6, 8]])
    assert [len(side) for side in undisturbed] == [8, 2]
    assert killed_once == undisturbed  # batches are positions in these: their order counts
