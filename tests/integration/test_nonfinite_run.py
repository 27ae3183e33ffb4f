"""A run meets a loss that is not finite: it stops, dumps, and the dump can be replayed."""

import json
import logging
from pathlib import Path

import pytest

from prefixrl_mcore.config.policy import LossConfig
from prefixrl_mcore.policy.nonfinite import NonFiniteError
from prefixrl_mcore.policy.policy import MegatronPolicy
from tests.support.tiny_run import TinyTask, metrics_of

OVERFLOWING = ("--loss.entropy-coefficient", "3e38")
"""The largest float32 is 3.4e38, so that rollouts of more than 1.1 nats of entropy overflow."""


@pytest.fixture(scope="module")
def failed(tiny_task: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended at its first update."""
    run = tmp_path_factory.mktemp("runs") / "overflowing"
    with pytest.raises(NonFiniteError, match=r"step 0: .* loss is -?inf, made by rollout") as error:
        tiny_task.run("train", run, *OVERFLOWING)
    assert str(run / "dumps" / "step-000000.json") in str(error.value)
    return run


def test_the_dump_of_a_run_is_replayed_by_the_command_line(
    tiny_task: TinyTask, failed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert metrics_of(failed, "train") == []
    dump = json.loads((failed / "dumps" / "step-000000.json").read_text())
    assert dump["error"].endswith("inf")
    culprits = [culprit["sequence_ids"] for culprit in dump["findings"]["culprits"]]
    assert culprits
    with caplog.at_level(logging.INFO):
        assert tiny_task.run("replay --step 0", failed, *OVERFLOWING) == 0
    line = next(text for text in caplog.messages if text.startswith("replay of step 0"))
    assert dump["error"] in line
    assert all(name in line for names in culprits for name in names)


def test_a_replay_under_other_settings_or_of_another_step_is_refused(
    tiny_task: TinyTask, failed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny_task.run("replay --step 0", failed, *OVERFLOWING, "--loss.baseline", "none") == 2
    assert "loss.baseline: 'mean' there, 'none' now" in capsys.readouterr().err
    config = failed / "config.json"  # and if config.json was edited, the dump knows better
    text = config.read_text()
    config.write_text(text.replace('"baseline": "mean"', '"baseline": "none"'))
    assert tiny_task.run("replay --step 0", failed, *OVERFLOWING, "--loss.baseline", "none") == 2
    assert "loss.baseline: 'mean' there, 'none' now" in capsys.readouterr().err
    config.write_text(text)
    assert tiny_task.run("replay --step 7", failed, *OVERFLOWING) == 2
    assert "no such dump" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dump_is_replayed_in_another_layout_by_the_command_line(
    tiny_task: TinyTask, failed: Path
) -> None:
    """Sequences are padded further, streams are shorter and more."""
    dump = json.loads((failed / "dumps" / "step-000000.json").read_text())
    layout = ("--policy.parallel.context-parallel-size", "2", "--batch.stream-tokens", "128")
    process = tiny_task.start("replay", failed, "--step", "0", *OVERFLOWING, *layout)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert dump["error"] in output
    assert "packed again for this layout" in output


def test_the_dump_has_the_time_of_a_save(
    tiny_task: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stall's limit for the phase ``other`` would end the search."""
    phases: list[str] = []

    def dump(error: NonFiniteError, policy: MegatronPolicy, *_: object, **__: object) -> Exception:
        phases.append(policy.phases.state.phase)
        return error

    monkeypatch.setattr("prefixrl_mcore.trainer.session.dump_and_explain", dump)
    with pytest.raises(NonFiniteError):
        tiny_task.run("train", tmp_path / "run", *OVERFLOWING)
    assert phases == ["save"]


def test_a_supervised_phase_dumps_too(
    tiny_task: TinyTask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "sft"
    flags = ("--method", "sft_then_rl", "--sft.lr", "1e30")  # the second update overflows
    flags += ("--sft.traces-per-step", "4", "--sft.validation-fraction", "0.25")
    with pytest.raises(NonFiniteError, match=r"step 1: policy version 1: .*dumps/sft/step-000001"):
        tiny_task.run("train", run, *flags)
    dump = json.loads((run / "dumps" / "sft" / "step-000001.json").read_text())
    assert dump["loss"] == LossConfig().model_dump()
    with caplog.at_level(logging.INFO):
        assert tiny_task.run("replay --step 1 --sft", run, *flags) == 0
    assert any(dump["error"] in text for text in caplog.messages if "replay of" in text)
