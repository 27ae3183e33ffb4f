"""Profiles that are not written must not end a run, and are not forgotten silently."""

import logging
from pathlib import Path

import pytest
import torch

from prefixrl_mcore.config.operations import ProfileConfig
from prefixrl_mcore.trainer.profiling import StepProfiler
from tests.support.topologies import ONE_RANK


def _profiler(
    folder: Path, *, steps: tuple[int, ...], ranks: tuple[int, ...] = (0,)
) -> StepProfiler:
    return StepProfiler(ProfileConfig(steps=steps, ranks=ranks), folder, ONE_RANK)


def test_a_storage_that_refuses_a_trace_ends_no_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("a file where the folder would be")
    with _profiler(tmp_path / "profile", steps=(2,)).step(2):
        pass
    assert "no profile of step 2 in" in caplog.text


def test_the_error_of_a_step_is_not_hidden_by_that_of_its_trace(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("")
    with pytest.raises(ZeroDivisionError), _profiler(tmp_path / "profile", steps=(2,)).step(2):
        raise ZeroDivisionError


def test_half_a_trace_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fill_the_disk(_self: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fill_the_disk)
    with _profiler(tmp_path, steps=(2,)).step(2):
        pass
    assert not list(tmp_path.iterdir())
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize(
    ("ranks", "first_step", "named"),
    [((0,), 3, "[1, 2]"), ((0,), 1, None), ((1,), 3, None)],
    ids=["past", "to come", "another rank's"],
)
def test_steps_of_an_earlier_start_are_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    ranks: tuple[int, ...],
    first_step: int,
    named: str | None,
) -> None:
    with caplog.at_level(logging.WARNING):
        _profiler(tmp_path, steps=(2, 1, 5), ranks=ranks).begin_steps(first_step)
    if named is None:
        assert caplog.text == ""
    else:
        assert f"profile.steps {named}: not recorded, the run goes on at step 3" in caplog.text
