"""Which checkpoints go: rules on names, and the pointer that a kill left behind."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixrl_mcore.checkpoint import manifest
from prefixrl_mcore.checkpoint.manifest import begin_folder
from prefixrl_mcore.checkpoint.retention import (
    KEEP_ALL,
    Candidate,
    Retention,
    best_names,
    deletable,
)
from prefixrl_mcore.checkpoint.run_checkpoints import (
    TrainerState,
    clean_up,
    complete_checkpoints,
    latest_checkpoint,
    publish,
    step_folder,
    write_trainer_state,
)
from prefixrl_mcore.config.run import KeepBestConfig

ACCURACY = "eval/train/accuracy"
NONE = frozenset[str]()


def candidates(*accuracies: float | None) -> list[Candidate]:
    """Checkpoints of steps 10, 20, ... with these accuracies; None was not evaluated."""
    return [
        Candidate(
            name=f"s{10 * index}",
            step=10 * index,
            metrics={} if accuracy is None else {ACCURACY: accuracy},
        )
        for index, accuracy in enumerate(accuracies, start=1)
    ]


def test_the_last_are_kept_and_the_oldest_go() -> None:
    found = candidates(None, None, None)
    assert deletable(found, Retention(keep_last=2), protected=NONE) == ["s10"]
    assert deletable(found, Retention(keep_last=5), protected=NONE) == []
    assert deletable(found, KEEP_ALL, protected=NONE) == []


def test_multiples_of_a_step_stay_for_good() -> None:
    found = candidates(*[None] * 6)
    rule = Retention(keep_last=1, keep_every_steps=20)
    assert deletable(found, rule, protected=NONE) == ["s10", "s30", "s50"]


@pytest.mark.parametrize(
    ("mode", "num", "best"),
    [
        pytest.param("max", 1, ["s20"], id="of equal ones the older"),
        pytest.param("max", 2, ["s20", "s40"], id="two"),
        pytest.param("min", 1, ["s10"], id="the lowest"),
        pytest.param("max", 9, ["s20", "s40", "s10"], id="not evaluated is never best"),
    ],
)
def test_the_best_are_kept(mode: str, num: int, best: list[str]) -> None:
    found = candidates(0.25, 0.75, None, 0.75, float("nan"))
    rule = KeepBestConfig(metric=ACCURACY, mode=mode, num=num)  # pyright: ignore[reportArgumentType]
    assert best_names(found, rule) == best
    kept = Retention(keep_last=1, keep_best=rule)
    names = {c.name for c in found}
    assert deletable(found, kept, protected=NONE) == sorted(names - {*best, "s50"})


def test_what_the_pointer_names_is_never_deleted() -> None:
    found = candidates(None, None, None)
    rule = Retention(keep_last=1)
    assert deletable(found, rule, protected=frozenset({"s10"})) == ["s20"]


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: Retention(keep_last=0), id="keep_last"),
        pytest.param(lambda: Retention(keep_every_steps=0), id="keep_every_steps"),
    ],
)
def test_rules_that_keep_nothing_are_refused(build: Callable[[], Retention]) -> None:
    with pytest.raises(ValueError, match="must be at least 1 or None, got 0"):
        build()


def write(folder: Path, step: int, retention: Retention, accuracy: float | None = None) -> Path:
    final = step_folder(folder, step)
    temporary = begin_folder(final)
    state = TrainerState(
        step=step,
        policy_version=step,
        has_optimizer=True,
        world_size=1,
        extra_state={},
        metrics={} if accuracy is None else {ACCURACY: accuracy},
    )
    write_trainer_state(temporary, state)
    publish(temporary, final, retention)
    return final


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def test_the_best_by_saved_metric_outlives_newer_checkpoints(tmp_path: Path) -> None:
    rule = Retention(keep_last=1, keep_every_steps=30, keep_best=KeepBestConfig(metric=ACCURACY))
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, 0.1), (40, 0.9), (50, None)):
        write(tmp_path, step, rule, accuracy)
    assert steps(tmp_path) == ["step-000020", "step-000030", "step-000050"]


def test_damaged_checkpoints_neither_count_nor_go(tmp_path: Path) -> None:
    good = write(tmp_path, 10, KEEP_ALL)
    damaged = write(tmp_path, 20, KEEP_ALL)
    (damaged / "trainer.json").write_text("")
    write(tmp_path, 30, Retention(keep_last=2))
    assert good.is_dir()
    assert damaged.is_dir()


def test_a_pointer_older_than_the_newest_checkpoint_is_overruled_and_repaired(
    tmp_path: Path,
) -> None:
    write(tmp_path, 10, KEEP_ALL)
    pointer = tmp_path / "latest"
    before = pointer.stat().st_mtime_ns
    newest = write(tmp_path, 20, KEEP_ALL)
    pointer.write_text("step-000010\n")  # killed between the rename and the pointer
    os.utime(pointer, ns=(before, before))
    assert latest_checkpoint(tmp_path) == newest
    assert pointer.read_text() == "step-000010\n"  # looking changes nothing
    assert clean_up(tmp_path).repaired_pointer
    assert pointer.read_text() == "step-000020\n"
    assert not clean_up(tmp_path).repaired_pointer


def test_a_pointer_set_back_by_hand_holds(tmp_path: Path) -> None:
    old = write(tmp_path, 10, KEEP_ALL)
    newest = write(tmp_path, 20, KEEP_ALL)
    pointer = tmp_path / "latest"
    pointer.write_text("step-000010\n")
    later = (newest / "manifest.json").stat().st_mtime_ns + 10**9
    os.utime(pointer, ns=(later, later))
    assert latest_checkpoint(tmp_path) == old
    assert not clean_up(tmp_path).repaired_pointer
    assert latest_checkpoint(tmp_path) == old


def test_leftovers_are_counted(tmp_path: Path) -> None:
    final = write(tmp_path, 10, KEEP_ALL)
    begin_folder(step_folder(tmp_path, 20))
    begin_folder(step_folder(tmp_path, 30))
    (tmp_path / ".latest.tmp-77").write_text("")
    final.rename(tmp_path / f".step-000010.replaced-{'0' * 32}")
    found = clean_up(tmp_path)
    assert (found.num_removed, found.num_restored, found.repaired_pointer) == (3, 1, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000010"]


def test_a_checkpoint_whose_pointer_cannot_be_written_is_saved_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "latest").mkdir()  # no file can take its place
    write(tmp_path, 1, KEEP_ALL)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000001"]
    assert "latest cannot be written" in caplog.text


def test_a_pointer_that_cannot_be_written_stops_neither_retention_nor_the_next_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "latest").mkdir()
    for step in (1, 2, 3):
        assert not clean_up(tmp_path).repaired_pointer
        write(tmp_path, step, Retention(keep_last=1))
        assert steps(tmp_path) == [f"step-{step:06d}"]
    assert caplog.text.count("latest cannot be written") == 5  # each save, and two repairs
    (tmp_path / "latest").rmdir()
    assert clean_up(tmp_path).repaired_pointer


def test_a_clock_that_is_behind_does_not_make_a_new_checkpoint_an_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 10, KEEP_ALL)
    monkeypatch.setattr("time.time", lambda: 1000.0)
    for step in (20, 15):  # a run that went back from 20 to 10
        newest = write(tmp_path, step, KEEP_ALL)
        assert complete_checkpoints(tmp_path)[-1] == newest
        assert latest_checkpoint(tmp_path) == newest
    write(tmp_path, 30, Retention(keep_last=2))
    assert steps(tmp_path) == ["step-000015", "step-000030"]


def test_a_checkpoint_whose_state_cannot_be_read_stays_and_the_others_go(tmp_path: Path) -> None:
    rule = Retention(keep_last=1, keep_best=KeepBestConfig(metric=ACCURACY))
    strange = write(tmp_path, 10, rule, 0.9)
    text = (strange / "trainer.json").read_text()
    (strange / "trainer.json").write_text(
        text.replace('"format_version": 1', '"format_version": 9')
    )
    for step, accuracy in ((20, 0.1), (30, 0.2), (40, 0.0)):
        write(tmp_path, step, rule, accuracy)
    assert steps(tmp_path) == ["step-000010", "step-000030", "step-000040"]


def refuse_nth_sync(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the flush of ``folder`` itself fail, as after the rename of a save."""
    sync = manifest.sync_to_disk

    def refuse(path: Path) -> None:
        if path == folder:
            raise OSError(errno.EIO, "Input/output error", str(path))
        sync(path)

    monkeypatch.setattr(manifest, "sync_to_disk", refuse)


def test_a_save_that_fails_after_its_rename_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        write(tmp_path, step, KEEP_ALL)
    refuse_nth_sync(monkeypatch, tmp_path)
    newest = write(tmp_path, 2, Retention(keep_last=2))  # in place of the one before
    assert "step-000002 is saved, but may not outlive a loss of power" in caplog.text
    assert latest_checkpoint(tmp_path) == newest
    assert (tmp_path / "latest").read_text() == "step-000002\n"


def test_a_save_whose_folder_vanished_is_not_taken_for_the_one_that_it_would_replace(
    tmp_path: Path,
) -> None:
    final = write(tmp_path, 1, KEEP_ALL)
    temporary = begin_folder(final)
    temporary.rmdir()
    with pytest.raises(FileNotFoundError):
        publish(temporary, final, KEEP_ALL)
