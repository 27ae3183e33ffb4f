"""The commands as a user runs them, one after the other, on a tiny task."""

import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prefixrl_mcore.accounting.parameters import count_parameters
from prefixrl_mcore.checkpoint.save_load import latest_checkpoint
from prefixrl_mcore.cli import main
from prefixrl_mcore.data.problem_sets import read_evaluation_sets
from prefixrl_mcore.data.traces import TraceStore
from prefixrl_mcore.eval.parts import parts_of_checkpoint
from prefixrl_mcore.loss.row_metrics import metric_names
from prefixrl_mcore.observability.phases import TIMED
from prefixrl_mcore.observability.run_folder import RunFolder
from prefixrl_mcore.policy import router
from prefixrl_mcore.records import Completion
from prefixrl_mcore.rollout.sglang.counters import PoolCounters
from prefixrl_mcore.rollout.weight_sync import syncer
from prefixrl_mcore.trainer.generation import (
    DYNAMIC_METRICS,
    OVERSAMPLING_METRICS,
    PARTIAL_METRICS,
)
from prefixrl_mcore.trainer.rollout_supply import OVERLAP_METRICS
from tests.support.sglang_environments import sglang_python
from tests.support.tiny_run import ROOT, TinyTask, metrics_of, without_clock

PEAK_FLOPS = 1e10

GPU_PEAKS = ("allocated", "reserved")
SOMETIMES = (("reward", "mean"), ("all_negative", "fraction"))


@pytest.fixture(scope="module")
def trained(tiny_task: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished PrefixRL run of four steps."""
    run = tmp_path_factory.mktemp("runs") / "prefixrl"
    flags = ("--trainer.peak-flops", str(PEAK_FLOPS), "--trainer.dry-run-step", "True")
    assert tiny_task.run("train", run, *flags) == 0
    return run


def test_collection_charges_every_try(tiny_task: TinyTask) -> None:
    store = TraceStore.open(tiny_task.folder / "traces")
    stats = store.stats()
    assert stats.num_solved == 8
    assert stats.num_tries >= 8
    num_parameters = count_parameters(tiny_task.folder / "base")
    assert stats.flops == 2 * num_parameters * stats.num_tokens
    assert all(record.num_tries % 16 == 0 for record in store.traces())


def test_three_of_four_training_items_have_a_prefix(trained: Path) -> None:
    groups = metrics_of(trained, "train")
    prefixed = sum(line["rollout/num_prefix_groups"] for line in groups)
    plain = sum(line["rollout/num_no_prefix_groups"] for line in groups)
    assert prefixed + plain == 16
    assert 8 <= prefixed <= 16


def test_each_step_and_evaluation_stands_once(trained: Path) -> None:
    assert [line["step"] for line in metrics_of(trained, "train")] == [0, 1, 2, 3]
    assert [line["step"] for line in metrics_of(trained, "eval")] == [0, 2, 4]


def test_flops_rise_from_the_cost_of_collection(tiny_task: TinyTask, trained: Path) -> None:
    collected = TraceStore.open(tiny_task.folder / "traces").total_flops()
    evaluations = metrics_of(trained, "eval")
    assert evaluations[0]["flops/total"] == evaluations[0]["flops/collect"] == collected
    totals = [line["flops/total"] for line in evaluations]
    assert totals == sorted(set(totals))


def test_the_phases_add_up_to_the_step(trained: Path) -> None:
    for line in metrics_of(trained, "train"):
        times = {name: value for name, value in line.items() if name.startswith("time/")}
        total = times.pop("time/step_seconds")
        assert sum(times.values()) == pytest.approx(total, abs=1e-9)
        assert times["time/other_seconds"] >= 0
        for phase in ("rollout", "forward_backward", "optimizer"):
            assert times[f"time/{phase}_seconds"] > 0
    saves = [line["time/save_seconds"] > 0 for line in metrics_of(trained, "train")]
    assert saves[:3] == [False, False, True]  # after step 1; one in the background may go on


def test_mfu_is_flops_over_the_given_peak(trained: Path) -> None:
    for line in metrics_of(trained, "train"):
        flops = line["throughput/update_flops_per_second"]
        assert line["throughput/update_mfu_fraction"] == pytest.approx(flops / PEAK_FLOPS)
        update = line["time/forward_backward_seconds"] + line["time/optimizer_seconds"]
        of_step = line["throughput/step_flops_per_second"] * line["time/step_seconds"]
        # The phases are within what is timed; a busy machine may come between them.
        assert update <= of_step / flops * (1 + 1e-9) < update + 0.25
        assert line["balance/flops_max_over_mean"] == 1.0  # one rank
        assert line["memory/peak_rss_bytes"] > 1e8


def metrics_of_a_pool() -> set[str]:
    """Return the names that a run with SGLang writes."""
    counters = PoolCounters(num_servers=1)
    completion = Completion(token_ids=(1,), logprobs=(0.0,), finish_reason="stop", policy_version=0)
    counters.note_answer(0, 5, [completion])
    return set(counters.metrics(num_ready=1))


def test_what_is_written_is_what_is_documented(trained: Path) -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    documented = [name for row in rows for name in re.findall(r"`([^`]*)`", row)]
    patterns = {re.compile(re.sub(r"<.*?>", "[^/]+", name)): name for name in documented}
    kinds = ("train", "eval", "outside")
    written = {name for kind in kinds for line in metrics_of(trained, kind) for name in line}
    written -= {"step", "kind", "time"}
    assert len(written) > 50
    sums, maxima = metric_names(has_rollout_logprobs=True, has_reference=True)
    written |= {*sums, *maxima, *router.METRIC_NAMES}
    written |= {f"time/{phase}_seconds" for phase in TIMED}
    written |= {*metrics_of_a_pool(), *syncer.METRIC_NAMES}
    written |= {  # of a GPU; of groups that may happen not to be among these; of other schedules
        *(f"memory/peak_{kind}_{what}" for kind in GPU_PEAKS for what in ("bytes", "rank")),
        *(f"rollout/{name}_no_prefix_{what}" for name, what in SOMETIMES),
        *(*OVERSAMPLING_METRICS, *PARTIAL_METRICS, *DYNAMIC_METRICS, *OVERLAP_METRICS),
    }
    assert [n for n in sorted(written) if not any(p.fullmatch(n) for p in patterns)] == []
    assert [n for p, n in patterns.items() if not any(map(p.fullmatch, written))] == []


def test_times_before_and_after_the_steps_are_written(trained: Path) -> None:
    before, after = metrics_of(trained, "outside")
    assert (before["step"], after["step"]) == (0, 4)
    assert before["time/eval_seconds"] > 0  # of the initial weights
    assert before["time/forward_backward_seconds"] > 0  # the dry-run step
    assert min(after["time/eval_seconds"], after["time/save_seconds"]) > 0
    assert after["time/rollout_seconds"] == 0


def test_engine_and_policy_agree_on_logprobs(trained: Path) -> None:
    gaps = [line["loss/logprob_gap_max_nats"] for line in metrics_of(trained, "train")]
    assert max(gaps) < 1e-4


def test_rollouts_are_written_with_their_version(trained: Path) -> None:
    table = pq.read_table(trained / "rollouts" / "step-000002.parquet").to_pylist()
    assert len(table) == 16
    assert {row["step"] for row in table} == {2}
    versions = {row["policy_version"] for row in table}
    assert versions == {int(metrics_of(trained, "train")[1]["policy/version"])}
    for row in table:
        assert len(row["rollout_logprobs"]) == len(row["completion_token_ids"])


def test_training_refuses_a_folder_with_a_run_and_changes_nothing(
    tiny_task: TinyTask, trained: Path
) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    assert tiny_task.run("train", trained) == 2
    assert tiny_task.run("train --resume", trained, "--seed", "5") == 2
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_a_resumed_run_equals_an_undisturbed_one(
    tiny_task: TinyTask, trained: Path, tmp_path: Path
) -> None:
    # Nor does a dry-run step change anything: ``trained`` took one, this run does not.
    run = tmp_path / "resumed"
    assert tiny_task.run("train", run, "--trainer.num-steps", "2") == 0
    assert tiny_task.run("train --resume", run) == 0
    for kind in ("train", "eval"):
        assert without_clock(metrics_of(run, kind)) == without_clock(metrics_of(trained, kind))


def _snapshot(run: Path) -> dict[str, bytes]:
    """Return the content of the files that tell what a run did."""
    kept = [run / "metrics.jsonl", *run.glob("rollouts/*"), *run.glob("checkpoints/*/*.json")]
    return {str(path.relative_to(run)): path.read_bytes() for path in kept}


def test_a_spent_budget_takes_no_further_step_however_often_it_is_resumed(
    tiny_task: TinyTask, tmp_path: Path
) -> None:
    run = tmp_path / "budget"
    flags = ("--trainer.max-flops", "1e9")
    assert tiny_task.run("train", run, *flags) == 0
    before = _snapshot(run)
    assert len(metrics_of(run, "train")) <= 1
    assert tiny_task.run("train --resume", run, *flags) == 0
    assert _snapshot(run) == before


def test_resume_refuses_to_begin_anew_where_checkpoints_were_lost(
    tiny_task: TinyTask, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = tmp_path / "lost"
    shutil.copytree(trained, lost)
    shutil.rmtree(lost / "checkpoints")
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged)
    for manifest in damaged.glob("checkpoints/*/manifest.json"):
        manifest.write_text("")
    for run in (lost, damaged):
        before = _snapshot(run)
        assert tiny_task.run("train --resume", run) == 2
        assert "no complete checkpoint" in capsys.readouterr().err
        assert _snapshot(run) == before


def test_resume_of_nothing_is_refused(tiny_task: TinyTask, tmp_path: Path) -> None:
    assert tiny_task.run("train --resume", tmp_path / "nothing") == 2
    assert not (tmp_path / "nothing").exists()


def test_a_mistyped_path_claims_no_folder(tiny_task: TinyTask, tmp_path: Path) -> None:
    run = tmp_path / "typo"
    assert tiny_task.run("train", run, "--data.prefixes", str(tmp_path / "nowhere")) == 2
    assert tiny_task.run("prefixes", run, "--data.traces", str(tmp_path / "nowhere")) == 2
    assert not (run / "config.json").exists()
    # Watched from before the model is loaded and the engine started.
    assert json.loads((run / "heartbeats" / "rank-00000.json").read_text())["phase"] == "start"


def test_a_run_killed_before_its_first_checkpoint_has_each_line_once(
    tiny_task: TinyTask, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "early"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "checkpoints")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))  # eval 0, train 0
    assert tiny_task.run("train --resume", run) == 0
    for kind in ("train", "eval"):
        assert without_clock(metrics_of(run, kind)) == without_clock(metrics_of(trained, kind))


def test_traces_of_other_weights_are_not_mixed(
    tiny_task: TinyTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_task.folder / "base", model)
    (weights_file,) = model.glob("*.safetensors")
    tensors = load_file(weights_file)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, weights_file)
    assert tiny_task.run("collect", tmp_path / "run", "--model.path", str(model)) == 2
    assert "collect into another data.traces" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_at_any_moment_continues(
    tiny_task: TinyTask, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    process = tiny_task.start("train", run)
    deadline = time.monotonic() + 300
    while not (run / "checkpoints" / "latest").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert tiny_task.run("train --resume", run) == 0
    assert without_clock(metrics_of(run, "train")) == without_clock(metrics_of(trained, "train"))


@pytest.mark.slow
def test_sigterm_finishes_the_step_saves_and_says_so(tiny_task: TinyTask, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    process = tiny_task.start("train", run, "--trainer.num-steps", "1000")
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or not metrics_of(run, "train"):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    steps = len(metrics_of(run, "train"))
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == f"step-{steps:06d}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_collect_prefixes_and_train_with_init_are_the_run_with_model_path(
    tiny_task: TinyTask, trained: Path, tmp_path: Path, kind: str
) -> None:
    base = tiny_task.folder / "base"
    init = {"folder": base, "checkpoint": tmp_path / "checkpoint"}[kind]
    if kind == "checkpoint":
        assert main(["convert", "from-hf", str(base), str(init)]) == 0
    task, run = replace(tiny_task, init=init), tmp_path / "run"
    data = (
        "--data.traces",
        str(tmp_path / "traces"),
        "--data.prefixes",
        str(tmp_path / "prefixes"),
    )
    for command in ("collect", "prefixes", "train"):
        assert task.run(command, run, *data) == 0, command

    of_files = {"seconds": 0.0, "source_model": "", "weights_hash": "of the files' bytes"}
    ours, theirs = (
        [replace(record, **of_files) for record in TraceStore.open(path).traces()]
        for path in (tmp_path / "traces", tiny_task.folder / "traces")
    )
    assert ours == theirs
    cut = Path("prefixes") / "prefixes.parquet"
    assert (tmp_path / cut).read_bytes() == (tiny_task.folder / cut).read_bytes()
    for lines in ("train", "eval"):
        assert without_clock(metrics_of(run, lines)) == without_clock(metrics_of(trained, lines))
    assert sum(line["rollout/num_prefix_groups"] for line in metrics_of(run, "train")) >= 8


@pytest.mark.parametrize("method", ["rl", "sft_then_rl"])
def test_the_baselines_are_the_same_program(
    tiny_task: TinyTask, tmp_path: Path, method: str
) -> None:
    run = tmp_path / method
    flags = ("--method", method, "--sft.lr", "1e-4", "--trainer.num-steps", "2")
    flags += (
        "--sft.max-epochs",
        "4",
        "--sft.keep",
        "last",
        "--policy.optimizer.schedule",
        "linear",
    )
    assert tiny_task.run("train", run, *flags) == 0
    first = metrics_of(run, "eval")[0]
    assert all(line["rollout/num_prefix_groups"] == 0 for line in metrics_of(run, "train"))
    if method == "rl":
        assert first["flops/total"] == 0
    else:
        assert first["flops/sft"] > 0
        assert first["flops/total"] == first["flops/collect"] + first["flops/sft"]
        epochs = metrics_of(run, "sft")
        assert [line["step"] for line in epochs] == [1, 2, 3, 4]
        rates = [line["policy/learning_rate"] for line in epochs]  # an epoch is one step
        assert rates == pytest.approx([1e-4, 0.75e-4, 0.5e-4, 0.25e-4])
        peak, halfway = (line["policy/learning_rate"] for line in metrics_of(run, "train"))
        assert halfway == pytest.approx(peak / 2)  # the other phase, over its two steps


@pytest.mark.slow
def test_training_with_a_real_sglang_server(tiny_task: TinyTask, tmp_path: Path) -> None:
    python = sglang_python()
    run = tmp_path / "sglang"
    flags = ("--rollout.engine", "sglang", "--rollout.sglang.python", str(python))
    assert tiny_task.run("train", run, *flags) == 0
    lines = metrics_of(run, "train")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert max(line["loss/logprob_gap_max_nats"] for line in lines) < 1e-4
    assert sum(line["policy/was_skipped"] for line in lines) < 4


def test_eval_convert_and_report(tiny_task: TinyTask, trained: Path, tmp_path: Path) -> None:
    assert tiny_task.run("eval", trained) == 0
    result = json.loads((trained / "eval" / "step-000004.json").read_text())
    assert result["is_complete"]
    assert set(result["sets"]) == {"train", "held-out"}
    assert set(result["sets"]["train"]["pass_at_k"]) == {"1", "4"}
    assert [row["fraction"] for row in result["unlock"]][:2] == [0.0, 0.1]
    config = RunFolder(trained).read_config()
    counted = parts_of_checkpoint(config.evaluation, read_evaluation_sets(config))
    for part in counted:
        found = result["parts"].get(part.name, {"num_correct": [], "num_samples": part.num_samples})
        assert found["num_samples"] == part.num_samples
        if part.name.startswith("bin/"):  # short traces have no token in some of them
            assert len(found["num_correct"]) <= len(part.problems)
        else:
            assert len(found["num_correct"]) == len(part.problems)
    assert {part.name for part in counted} >= set(result["parts"])

    checkpoint = latest_checkpoint(trained / "checkpoints")
    out = tmp_path / "hf"
    assert main(["convert", "to-hf", str(checkpoint), str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    expected = count_parameters(tiny_task.folder / "base")
    assert sum(p.numel() for p in model.parameters()) == expected

    back = tmp_path / "back"
    assert main(["convert", "from-hf", str(out), str(back)]) == 0
    again = tmp_path / "hf-again"
    assert main(["convert", "to-hf", str(back), str(again)]) == 0
    other = AutoModelForCausalLM.from_pretrained(again)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name

    page = tmp_path / "report.html"
    assert main(["report", str(trained), "--out", str(page)]) == 0
    assert "held-out" in page.read_text()


def test_eval_takes_a_checkpoint_of_any_name(
    tiny_task: TinyTask, trained: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "mine"
    assert main(["convert", "from-hf", str(tiny_task.folder / "base"), str(checkpoint)]) == 0
    assert tiny_task.run(f"eval --checkpoint {checkpoint}", tmp_path / "run") == 0
    result = json.loads((tmp_path / "run" / "eval" / "mine.json").read_text())
    assert (result["step"], result["is_complete"]) == (0, True)


def test_eval_of_a_missing_checkpoint_names_those_that_exist(
    tiny_task: TinyTask, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny_task.run("eval --checkpoint 77", trained) == 2
    assert "step-000004" in capsys.readouterr().err


def test_prefixes_cut_again_are_the_same(tiny_task: TinyTask) -> None:
    before = (tiny_task.folder / "prefixes" / "prefixes.parquet").read_bytes()
    assert tiny_task.run("prefixes", tiny_task.folder / "collect") == 0
    assert (tiny_task.folder / "prefixes" / "prefixes.parquet").read_bytes() == before


def test_a_finished_collection_has_nothing_to_do(tiny_task: TinyTask) -> None:
    before = TraceStore.open(tiny_task.folder / "traces").stats()
    assert tiny_task.run("collect", tiny_task.folder / "collect") == 0
    assert TraceStore.open(tiny_task.folder / "traces").stats() == before
