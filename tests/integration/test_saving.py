"""Saving during a run, as a user meets it: in the background, on a clock, on a full disk."""

import errno
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefixrl_mcore.checkpoint.run_checkpoints import latest_checkpoint, read_trainer_state
from prefixrl_mcore.cli import main
from tests.support.disks import small_disk_at
from tests.support.tiny_run import TinyTask, metrics_of, without_clock

NUM_STEPS = ("--trainer.num-steps", "4", "--checkpoint.every-steps", "1")


@pytest.fixture(scope="module")
def undisturbed(tiny_task: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert tiny_task.run("train", run, *NUM_STEPS) == 0
    return run


def assert_same_metrics(run: Path, expected: Path) -> None:
    for kind in ("train", "eval"):
        assert without_clock(metrics_of(run, kind)) == without_clock(metrics_of(expected, kind))


def test_a_run_that_waits_for_its_saves_is_the_same_run(
    tiny_task: TinyTask, undisturbed: Path, tmp_path: Path
) -> None:
    """The other one saves in the background, as is the default."""
    run = tmp_path / "waiting"
    flags = (*NUM_STEPS, "--checkpoint.no-in-background")
    assert tiny_task.run("train", run, *flags, "--trainer.num-steps", "2") == 0
    assert tiny_task.run("train --resume", run, *flags) == 0
    assert_same_metrics(run, undisturbed)
    assert main(["checkpoint", "verify", str(run)]) == 0
    latest = latest_checkpoint(run / "checkpoints")
    assert latest is not None
    assert latest.name == "step-000004"
    assert len(list((run / "checkpoints").iterdir())) == 3  # keep_last = 2, and the pointer


def test_a_run_stops_before_its_time_is_over_and_goes_on_exactly(
    tiny_task: TinyTask, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "timed"
    # Shorter than any start takes; each start takes one step all the same.
    flags = (*NUM_STEPS, "--trainer.max-seconds", "0.001", "--trainer.stop-margin-seconds", "0")
    codes = [tiny_task.run("train", run, *flags)]
    while codes[-1] == 75:
        codes.append(tiny_task.run("train --resume", run, *flags))
    assert codes == [75, 75, 75, 0]
    assert_same_metrics(run, undisturbed)


def test_what_a_checkpoint_remembers(undisturbed: Path) -> None:
    latest = latest_checkpoint(undisturbed / "checkpoints")
    assert latest is not None
    state = read_trainer_state(latest)
    assert state.extra_state.keys() == {
        *(
            "step",
            "method",
            "source",
            "flops",
            "is_evaluated",
            "wandb_id",
            "save_seconds",
            "inputs",
            "rollouts",
        ),
        *("settings", "config_hash"),
    }
    assert state.extra_state["rollouts"] == {"carried": [], "ready": None}
    assert state.extra_state["is_evaluated"] is True
    evaluation = metrics_of(undisturbed, "eval")[-1]
    assert state.metrics["eval/train/accuracy"] == evaluation["eval/train/accuracy"]
    assert state.layout == {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "etp": 1, "dp": 1}


def test_a_checkpoint_of_other_settings_is_refused(
    tiny_task: TinyTask,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run folder's config was edited by hand; the checkpoint still knows better."""
    run = tmp_path / "edited"
    subprocess.run(["cp", "-a", str(undisturbed), str(run)], check=True)
    config = run / "config.json"
    text, count = re.subn(r'"seed": 0,', '"seed": 5,', config.read_text(), count=1)
    assert count == 1
    config.write_text(text)
    assert tiny_task.run("train --resume", run, "--seed", "5") == 2
    error = capsys.readouterr().err
    assert "step-000004: was saved under other settings" in error
    assert "  seed: 0 there, 5 now\n" in error


def test_a_run_with_a_reference_goes_on_exactly_with_that_reference_only(
    tiny_task: TinyTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_task.folder / "base", model)
    kl = ("--loss.kl", "k2", "--loss.kl-coefficient", "0.1")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert tiny_task.run("train", whole, *kl, "--trainer.num-steps", "2") == 0
    assert tiny_task.run("train", run, *kl, "--trainer.num-steps", "1") == 0
    flags = ("--trainer.num-steps", "2", "--model.path", str(model))
    assert tiny_task.run("train --resume", run, *kl, *flags) == 0  # moved
    lines = metrics_of(run, "train")
    assert without_clock(lines) == without_clock(metrics_of(whole, "train"))
    # 2ND for the reference and 6ND for the update beside 2ND for sampling.
    assert lines[-1]["flops/update"] == 4 * lines[-1]["flops/sampling"]
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert tiny_task.run("train --resume", run, *kl, *flags) == 2
    assert "was saved with other content (SHA-256) of:\n  reference:" in capsys.readouterr().err


_refused: list[str] = []


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Refuse to open files below the folders that a test names (hooks cannot be removed)."""
    if event == "open" and any(part in str(arguments[0]) for part in _refused):
        raise OSError(errno.ENOSPC, "No space left on device", str(arguments[0]))


sys.addaudithook(_refuse)


def test_a_run_without_a_complete_first_save_begins_anew_however_far_it_got(
    tiny_task: TinyTask, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "never saved"
    _refused.append(f"{run}/checkpoints/.step-")
    try:
        assert tiny_task.run("train", run, *NUM_STEPS) == 1
    finally:
        _refused.clear()
    assert "No space left on device" in capsys.readouterr().err
    assert len(metrics_of(run, "train")) == 4
    assert tiny_task.run("train --resume", run, *NUM_STEPS) == 0
    assert_same_metrics(run, undisturbed)


def test_a_supervised_phase_goes_on_without_an_epoch_that_the_storage_refuses(
    tiny_task: TinyTask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "sft"
    flags = ("--method", "sft_then_rl", "--trainer.num-steps", "1", "--sft.max-epochs", "2")
    flags += ("--sft.keep", "last", "--sft.validation-fraction", "0.25")
    _refused.append(f"{run}/sft/.step-000001.writing-")
    try:
        assert tiny_task.run("train", run, *flags) == 0
    finally:
        _refused.clear()
    assert [line["step"] for line in metrics_of(run, "sft")] == [1, 2]
    assert [line["checkpoint/num_failed_saves"] for line in metrics_of(run, "train")] == [1.0]
    assert sum("No space left on device" in text for text in caplog.messages) == 1
    kept = latest_checkpoint(run / "sft")
    assert kept is not None
    assert kept.name == "step-000002"


def test_a_supervised_phase_fails_if_its_last_epoch_cannot_be_saved(
    tiny_task: TinyTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "sft"
    flags = ("--method", "sft_then_rl", "--sft.max-epochs", "1", "--sft.keep", "last")
    _refused.append(f"{run}/sft/.step-000001.writing-")
    try:
        assert tiny_task.run("train", run, *flags, "--sft.validation-fraction", "0.25") == 1
    finally:
        _refused.clear()
    assert "No space left on device" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A run's folder of checkpoints on a file system of its own."""
    with small_disk_at(tmp_path / "run" / "checkpoints", mebibytes=64) as folder:
        yield folder


def wait_for(condition: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.mount
@pytest.mark.parametrize("in_background", ["no-in-background", "in-background"])
def test_a_run_outlives_a_full_disk(
    tiny_task: TinyTask, small_disk: Path, in_background: str
) -> None:
    run = small_disk.parent
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(63 * 2**20))
    flags = ("--trainer.num-steps", "1000", f"--checkpoint.{in_background}")
    process = tiny_task.start("train", run, *flags)

    def failed_saves() -> float:
        return max((m["checkpoint/num_failed_saves"] for m in metrics_of(run, "train")), default=0)

    wait_for(lambda: failed_saves() >= 2, process)
    assert not (small_disk / "latest").exists()
    ballast.unlink()
    wait_for((small_disk / "latest").exists, process)
    process.terminate()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    errors = output.count("No space left on device")
    assert errors == failed_saves(), output  # one clear line for each
    latest = latest_checkpoint(small_disk)
    assert latest is not None
    assert latest.name == f"step-{len(metrics_of(run, 'train')):06d}"


@pytest.mark.slow
def test_a_supervised_phase_that_is_stopped_at_every_step_comes_to_the_same_end(
    tiny_task: TinyTask, tmp_path: Path
) -> None:
    """Its learning rate is so high that no epoch helps: only patience ends it."""
    flags = (
        "--method",
        "sft_then_rl",
        "--trainer.num-steps",
        "1",
        "--sft.lr",
        "1e-1",
        "--sft.keep",
        "best",
    )
    flags += ("--sft.traces-per-step", "4", "--sft.validation-fraction", "0.25")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert tiny_task.run("train", whole, *flags) == 0
    epochs = metrics_of(whole, "sft")
    assert len(epochs) == 2, epochs  # of 16: the patience of the default
    limit = (*flags, "--trainer.max-seconds", "0.001", "--trainer.stop-margin-seconds", "0")
    codes = [tiny_task.run("train", cut, *limit)]
    while codes[-1] == 75 and len(codes) < 9:
        codes.append(tiny_task.run("train --resume", cut, *limit))
    assert codes[-1] == 0
    assert len(codes) >= 4  # in the middle of epochs, too
    for kind in ("sft", "train", "eval"):
        assert without_clock(metrics_of(cut, kind)) == without_clock(metrics_of(whole, kind))
