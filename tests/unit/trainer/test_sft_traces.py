"""What the supervised phase makes of a trace store, before there is a policy."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.config.sft import SftConfig
from prefixrl_mcore.data.traces import AttemptRecord, TraceRecord, TraceStore, build_trace_id
from prefixrl_mcore.launch.supervised import supervised_rows
from prefixrl_mcore.records import Trace
from prefixrl_mcore.trainer import build
from prefixrl_mcore.trainer.build import read_sft_traces
from prefixrl_mcore.trainer.sft import split_traces

HASHES = {"tokenizer_hash": "t" * 64, "chat_template_hash": "c" * 64}
RENDERER: Any = SimpleNamespace(**HASHES)


class _BuiltError(Exception):
    """All checks before the policy were passed."""


def trace(number: int, *, num_tokens: int = 2) -> TraceRecord:
    problem_id, completion = f"p{number}", (number, 9) * (num_tokens // 2)
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
        return split_traces(traces, SftConfig(validation_fraction=0.2), seed=0)

    undisturbed = split("undisturbed", [range(10)])
    killed_once = split("killed", [[3, 7, 4], [0, 1, 9], [2, 5, 6, 8]])
    assert [len(side) for side in undisturbed] == [8, 2]
    assert killed_once == undisturbed  # batches are positions in these: their order counts


def phase(folder: Path, **optimizer: Any) -> RunConfig:
    """Return a run whose 50 traces, 44 of them trained on, are 3 steps an epoch, 48 in all."""
    sft = {"max_epochs": 16, "traces_per_step": 16, "validation_fraction": 0.125}
    return config(folder, sft=sft, policy={"optimizer": optimizer})


def check_supervised_phase(run: RunConfig, num_traces: int) -> None:
    run.sft.check_phase(run.policy.optimizer, num_traces)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        pytest.param(
            {"schedule": "cosine", "num_warmup_steps": 48},
            r"44 of 50 traces, 16 a step, for 16 epochs are 48 steps\): .*got 48 >= 48\. Collect",
            id="warm-up",
        ),
        pytest.param(
            {"schedule": "wsd", "num_warmup_steps": 44},
            r"are 48 steps\): .*got num_warmup_steps 44 \+ decay_fraction 0\.1 of 48 steps = 5",
            id="decay",
        ),
    ],
)
def test_a_phase_shorter_than_its_schedule_is_refused_with_its_length(
    tmp_path: Path, optimizer: dict[str, Any], message: str
) -> None:
    too_long = phase(tmp_path, **optimizer)
    with pytest.raises(ConfigError, match=message):
        check_supervised_phase(too_long, 50)
    one_less = optimizer | {"num_warmup_steps": optimizer["num_warmup_steps"] - 1}
    check_supervised_phase(phase(tmp_path, **one_less), 50)
    check_supervised_phase(too_long, 56)  # 49 are trained on: 4 steps an epoch
    with pytest.raises(ConfigError, match="leaves nothing"):
        check_supervised_phase(too_long, 3)


@pytest.mark.parametrize(("num_warmup_steps", "is_told"), [(47, False), (48, True)])
def test_a_constant_rate_that_is_never_reached_is_told(
    tmp_path: Path, num_warmup_steps: int, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    check_supervised_phase(phase(tmp_path, num_warmup_steps=num_warmup_steps), 50)
    assert ("warm-up of 48 steps outlasts the phase" in caplog.text) == is_told


def test_a_phase_that_is_too_short_is_refused_before_a_policy_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(tmp_path, [range(50)])
    monkeypatch.setattr(build, "PromptRenderer", lambda *_: RENDERER)
    monkeypatch.setattr(build, "run_on_first", lambda action: action())
    monkeypatch.setattr(build, "read_evaluation_sets", lambda _: {"train": []})
    monkeypatch.setattr(build, "original_problems", list)
    built = list[RunConfig]()

    def policy(config: RunConfig) -> None:
        built.append(config)
        raise _BuiltError

    monkeypatch.setattr(build, "build_policy", policy)
    nothing: Any = None
    topology: Any = SimpleNamespace(device=torch.device("cpu"))
    for num_warmup_steps, expected in ((48, ConfigError), (47, _BuiltError)):
        run = phase(tmp_path, schedule="linear", num_warmup_steps=num_warmup_steps)
        with pytest.raises(expected), ExitStack() as stack:
            build.build_session(run, nothing, topology, stack, phases=nothing, stop=nothing)
    assert [run.policy.optimizer.num_warmup_steps for run in built] == [47]


def test_check_counts_the_steps_tokens_and_flops_of_the_traces(tmp_path: Path) -> None:
    write_store(tmp_path, [range(49), [49]])
    again, longest = trace(0, num_tokens=90), trace(50, num_tokens=38)
    TraceStore.open(tmp_path).append([again, longest], [attempt(0), attempt(50)])
    run = phase(tmp_path)  # 51 problems: 6 are held back, 45 are 3 steps of 16
    (row,) = supervised_rows(run, num_parameters=1000)
    tokens = 16 * (44 * 4 + 40)
    assert row == (
        "supervised phase",
        "at most 48 steps = 16 epochs x 3, 16 traces a step; 6 of 51 are held back\n"
        f"tokens: at most {tokens}, {6 * 1000 * tokens:.3g} FLOPs (6ND update); the longest trace "
        f"has 40 with its prompt, a stream {run.stream_tokens}",
    )
    assert supervised_rows(run.model_copy(update={"method": "prefixrl"}), 1000) == []


def test_check_says_what_is_known_before_there_are_traces(tmp_path: Path) -> None:
    run = config(tmp_path, rollout={"max_total_tokens": 1000, "max_completion_tokens": 100})
    expected = (
        "at most 16 epochs, 16 traces a step; the steps are known when the traces are there\n"
        "tokens of a step: at most 1.6e+04 (16 x 1000)"
    )
    assert supervised_rows(run, 1000) == [("supervised phase", expected)]
    write_store(tmp_path, [])  # a collection that has not solved anything yet
    assert supervised_rows(run, 1000) == [("supervised phase", expected)]
    TraceStore.open(tmp_path).append([trace(0)], [attempt(0)])
    ((_, text),) = supervised_rows(run, 1000)
    assert text.startswith("cannot begin yet: sft.validation_fraction 0.125 of 1 traces leaves")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"rollout": {"max_total_tokens": 19, "max_completion_tokens": 4}},
            "prompt and trace of problem 'p8' have 20 tokens, expected at most the 19 of a stream",
            id="length",
        ),
        pytest.param(
            {"policy": {"optimizer": {"schedule": "cosine", "num_warmup_steps": 16}}},
            "8 of 9 traces, 16 a step, for 16 epochs are 16 steps",
            id="schedule",
        ),
    ],
)
def test_check_refuses_the_traces_that_training_refuses(
    tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(tmp_path, [range(8)])
    TraceStore.open(tmp_path).append([trace(8, num_tokens=18)], [attempt(8)])
    run = config(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        supervised_rows(run, 1000)
    nothing: Any = None
    topology: Any = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(build, "PromptRenderer", lambda *_: RENDERER)
    monkeypatch.setattr(build, "read_evaluation_sets", lambda _: {"train": []})
    monkeypatch.setattr(build, "original_problems", list)
    with pytest.raises(ConfigError, match=message), ExitStack() as stack:
        build.build_session(run, nothing, topology, stack, phases=nothing, stop=nothing)
