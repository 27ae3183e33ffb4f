"""Saving beside training: snapshots, read-back, refusing storage, one save at a time."""

import errno
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixrl_mcore.checkpoint import staged
from prefixrl_mcore.checkpoint.manifest import ReadBackError, SaveError, verify
from prefixrl_mcore.checkpoint.retention import Retention
from prefixrl_mcore.checkpoint.run_checkpoints import clean_up, latest_checkpoint
from prefixrl_mcore.checkpoint.save_load import load_checkpoint
from prefixrl_mcore.checkpoint.saver import CheckpointSaver, save_checkpoint
from prefixrl_mcore.checkpoint.torch_dist import TorchDistReader
from prefixrl_mcore.config.policy import OptimizerConfig
from prefixrl_mcore.config.run import KeepBestConfig
from prefixrl_mcore.policy.policy import MegatronPolicy
from tests.support.disks import no_file_above, small_disk_at
from tests.support.policies import build_policy, make_batch, max_difference, weights_of
from tests.support.tiny_models import build_tiny_qwen3, write_model_folder, write_tiny_qwen3

BOTH = pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in background"])
TENSOR_FILE = "__0_0.distcp"
_gate: threading.Event | None = None


def _hold_the_writer(event: str, arguments: tuple[object, ...]) -> None:
    """Hold whoever opens a tensor file for as long as a test says (hooks cannot be removed)."""
    if _gate is not None and event == "open" and str(arguments[0]).endswith(TENSOR_FILE):
        _gate.wait(60)


sys.addaudithook(_hold_the_writer)


@contextmanager
def held_writer() -> Iterator[threading.Event]:
    """Keep a writer in the background from its file until the event is set."""
    global _gate
    _gate = threading.Event()
    try:
        yield _gate
    finally:
        _gate.set()
        _gate = None


def save(saver: CheckpointSaver, step: int, policy: MegatronPolicy) -> Path | None:
    saver.start(step, policy, {})
    return saver.finish(wait=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_save_in_the_background_holds_the_moment_it_was_started(
    source: Path, tmp_path: Path, dtype: str, is_sharded: bool
) -> None:
    optimizer = OptimizerConfig(lr=1e-3, use_distributed_optimizer=is_sharded)
    policy = build_policy(source, optimizer=optimizer, dtype=dtype)
    policy.update(make_batch())
    saver = CheckpointSaver(tmp_path, in_background=True)
    then = weights_of(policy)
    with held_writer() as gate:
        saver.start(1, policy, {"cursor": 1})
        expected = [policy.update(make_batch()), policy.update(make_batch())]
        assert saver.finish(wait=False) is None
        assert latest_checkpoint(tmp_path) is None
        gate.set()
        path = saver.finish(wait=True)
    assert path == tmp_path / "step-000001"
    assert not saver.is_under_way
    assert saver.finish(wait=True) is None
    verify(path)
    now = weights_of(policy)
    assert max_difference(then, now) > 1e-4

    resumed = build_policy(source, optimizer=optimizer, dtype=dtype)
    assert load_checkpoint(path, resumed) == (1, {"cursor": 1})
    assert max_difference(weights_of(resumed), then) == 0.0
    assert [resumed.update(make_batch()), resumed.update(make_batch())] == expected
    assert max_difference(weights_of(resumed), now) == 0.0


def test_a_second_save_waits_for_its_turn(source: Path, tmp_path: Path) -> None:
    policy = build_policy(source)
    saver = CheckpointSaver(tmp_path, in_background=True)
    saver.start(1, policy, {})
    with pytest.raises(AssertionError, match="one save at a time"):
        saver.start(2, policy, {})
    saver.finish(wait=True)


def test_a_stop_reckons_with_the_save_under_way_and_a_last_one(
    source: Path, tmp_path: Path
) -> None:
    policy = build_policy(source)
    saver = CheckpointSaver(tmp_path, in_background=True)
    assert saver.seconds_to_stop == 0.0
    with held_writer() as gate:
        saver.start(1, policy, {})
        time.sleep(0.2)
        assert saver.seconds_to_stop > 0.4
        gate.set()
        saver.finish(wait=True)
    assert saver.longest_seconds > 0.2
    assert saver.seconds_to_stop == saver.longest_seconds
    saver.longest_seconds = 100.0  # as a resumed run is told
    saver.start(2, policy, {})
    assert saver.seconds_to_stop == 200.0
    saver.finish(wait=True)
    at_once = CheckpointSaver(tmp_path)
    save(at_once, 3, policy)
    assert at_once.longest_seconds > 0.0
    assert at_once.seconds_to_stop == 0.0  # part of the step's own time


def overwrite_with_the_first_save(folder: Path) -> None:
    """What a writer does that keeps a reference to its first snapshot."""
    (under_way,) = folder.glob(".step-*.writing-*")
    old = folder / "step-000001" / "megatron" / TENSOR_FILE
    new = under_way / "megatron" / TENSOR_FILE
    assert old.stat().st_size == new.stat().st_size
    shutil.copyfile(old, new)


def test_a_save_that_wrote_old_tensors_is_found_and_not_sealed(
    source: Path, tmp_path: Path
) -> None:
    policy = build_policy(source)
    policy.update(make_batch())
    save_checkpoint(tmp_path, 1, policy, {})
    policy.update(make_batch())
    saver = CheckpointSaver(tmp_path, in_background=True)
    saver.start(2, policy, {})
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    overwrite_with_the_first_save(tmp_path)
    with pytest.raises(ReadBackError, match=r"read back is not.*rank 0: .* bytes differ") as error:
        saver.finish(wait=True)
    assert not isinstance(error.value, ValueError)  # which the command line takes for bad input
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]
    save_checkpoint(tmp_path, 3, policy, {})  # and the next one is right again


@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "distributed"])
def test_every_kind_of_tensor_is_read_back(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_sharded: bool
) -> None:
    policy = build_policy(
        source, optimizer=OptimizerConfig(lr=1e-3, use_distributed_optimizer=is_sharded)
    )
    policy.update(make_batch())
    choose = staged._choose_probe
    probes: list[staged.Probe] = []

    def choose_all(state: dict[str, Any], turn: int) -> staged.Probe | None:
        probes.extend(probe for other in range(1000) if (probe := choose(state, other)))
        return choose(state, turn)

    monkeypatch.setattr(staged, "_choose_probe", choose_all)
    path = save_checkpoint(tmp_path, 1, policy, {})
    reader = TorchDistReader(path / "megatron")
    drawn = {(probe.name, probe.offsets): probe for probe in probes}
    assert {name for name, _ in drawn} == reader.shapes.keys()
    for (name, offsets), probe in drawn.items():
        assert torch.equal(reader.read_piece(name, offsets), probe.value)


@pytest.mark.parametrize("num_refusals", [1, 99], ids=["late", "never"])
def test_storage_that_does_not_give_back_is_asked_again_and_is_no_corruption(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_refusals: int
) -> None:
    policy = build_policy(source)
    monkeypatch.setattr(staged, "_READ_BACK_PAUSES_SECONDS", (0.0, 0.0))
    tries: list[str] = []
    open_path = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == TENSOR_FILE and arguments == ("rb",) and len(tries) < num_refusals:
            tries.append(path.name)
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return open_path(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    if num_refusals == 1:
        assert save_checkpoint(tmp_path, 1, policy, {}).is_dir()
    else:
        with pytest.raises(SaveError, match=r"cannot be read back: rank 0: .*Stale file handle"):
            save_checkpoint(tmp_path, 1, policy, {})
        assert list(tmp_path.iterdir()) == []
    assert len(tries) == min(num_refusals, 3)


def test_a_run_that_went_back_does_not_count_the_checkpoints_it_left(
    source: Path, tmp_path: Path
) -> None:
    policy = build_policy(source)
    best = KeepBestConfig(metric="accuracy")
    rule = Retention(keep_last=2, keep_every_steps=40, keep_best=best)
    for step, accuracy in ((10, 0.1), (20, 0.2), (30, 0.9), (40, 0.3)):
        save_checkpoint(tmp_path, step, policy, {}, metrics={"accuracy": accuracy})
    saver = CheckpointSaver(tmp_path, rule)
    saver.resume_from(20)
    assert len(list(tmp_path.glob("step-*"))) == 4  # until there is something newer
    save(saver, 35, policy)
    names = ["step-000020", "step-000035"]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == names
    save(saver, 40, policy)  # this one is of the new course
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [*names, "step-000040"]


@BOTH
def test_a_refusing_storage_keeps_the_old_checkpoint_and_a_retry_succeeds(
    source: Path, tmp_path: Path, in_background: bool
) -> None:
    policy = build_policy(source)
    save_checkpoint(tmp_path, 1, policy, {})
    size = (tmp_path / "step-000001" / "megatron" / TENSOR_FILE).stat().st_size
    policy.update(make_batch())
    saver = CheckpointSaver(tmp_path, Retention(keep_last=1), in_background=in_background)
    for limit in (size // 2, 300, 10):  # while writing tensors, the index, the first files
        with no_file_above(limit), pytest.raises(SaveError, match="File too large"):
            save(saver, 2, policy)
        assert not saver.is_under_way
        clean_up(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]
        verify(tmp_path / "step-000001")
    saver.start(2, policy, {})
    assert saver.finish(wait=True) == latest_checkpoint(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000002"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk_at(tmp_path / "disk", mebibytes=3) as folder:
        yield folder


@BOTH
@pytest.mark.mount
def test_a_full_disk_keeps_the_old_checkpoint_wherever_the_space_ends(
    source: Path, small_disk: Path, in_background: bool
) -> None:
    policy = build_policy(source)
    folder = small_disk / "checkpoints"
    save_checkpoint(folder, 1, policy, {})
    needed = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    saver = CheckpointSaver(folder, Retention(keep_last=1), in_background=in_background)
    ballast = small_disk / "ballast"
    outcomes: list[str] = []
    for left in range(0, needed + 65536, needed // 6):
        ballast.write_bytes(b"")
        free = shutil.disk_usage(small_disk).free
        ballast.write_bytes(bytes(max(0, free - left)))
        try:
            save(saver, 2, policy)
        except SaveError as error:
            outcomes.append(str(error))
            latest = latest_checkpoint(folder)
            assert latest == folder / "step-000001"
            verify(latest)
        else:
            break
    ballast.unlink()
    assert len(outcomes) >= 4
    assert all("No space left" in outcome for outcome in outcomes)
    assert save(saver, 3, policy) == folder / "step-000003"


@pytest.mark.slow
def test_the_training_step_waits_less_for_a_save_in_the_background(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints how long a step waits, and how much longer the steps beside the writer take.

    The ratio of the waits is in docs/checkpoints.md and EXPERIMENTS.md.
    """
    model = build_tiny_qwen3(hidden_size=512, ffn_size=2048, num_layers=8, vocab_size=4096)
    policy = build_policy(write_model_folder(model, tmp_path / "model"))
    policy.update(make_batch())
    start = time.perf_counter()
    policy.update(make_batch())
    alone = time.perf_counter() - start
    beside: list[float] = []
    stalls: dict[bool, list[float]] = {False: [], True: []}
    for in_background in (False, True) * 4:
        saver = CheckpointSaver(
            tmp_path / "checkpoints", Retention(keep_last=1), in_background=in_background
        )
        start = time.perf_counter()
        saver.start(1, policy, {})
        if in_background:
            stall = time.perf_counter() - start
            while any(thread.name == "checkpoint" for thread in threading.enumerate()):
                begin = time.perf_counter()
                policy.update(make_batch())
                beside.append(time.perf_counter() - begin)
            start = time.perf_counter() - stall
        saver.finish(wait=True)
        stalls[in_background].append(time.perf_counter() - start)
    at_once, in_background = (statistics.median(stalls[key]) for key in (False, True))
    (path,) = (tmp_path / "checkpoints").glob("step-*")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    with capsys.disabled():
        print(  # noqa: T201  (the purpose of this test)
            f"\ncheckpoint of {size / 1e6:.0f} MB: the step waits {at_once:.3f} s at once, "
            f"{in_background:.3f} s in the background, ratio {in_background / at_once:.2f}; a step "
            f"takes {alone:.3f} s alone, {statistics.mean(beside):.3f} s beside the writer, of "
            f"which there were {len(beside) / 4:.1f} a save"
        )
    assert in_background < at_once
