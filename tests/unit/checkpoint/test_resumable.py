"""What is kept of a killed conversion, and what is not."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf, convert_to_hf
from prefixrl_mcore.checkpoint.manifest import CheckpointError, SaveError, StorageReadError
from prefixrl_mcore.checkpoint.resumable import ResumableFolder
from prefixrl_mcore.trainer.convert_commands import _Work
from tests.support.disks import no_file_above
from tests.support.policies import max_difference
from tests.support.tiny_models import write_tiny_qwen3
from tests.support.weights import weights_in

MAX_FILE_BYTES = 60_000


class StoppedError(Exception):
    """Stands for a kill: nothing is caught and mended."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    source = write_tiny_qwen3(tmp_path / "source")
    convert_from_hf(source, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def stop_after(num_bytes: int) -> Callable[[int], Callable[[int], object]]:
    """Return an ``on_start`` that stops the conversion after so many bytes."""
    done = 0

    def on_bytes(number: int) -> None:
        nonlocal done
        done += number
        if done > num_bytes:
            raise StoppedError

    return lambda _total: on_bytes


def stopped(checkpoint: Path, out: Path) -> Path:
    """Convert two files and a half; return the folder that is left."""
    with pytest.raises(StoppedError):
        convert_to_hf(checkpoint, out, max_file_bytes=MAX_FILE_BYTES, on_start=stop_after(100_000))
    folder = out.with_name(f".{out.name}.converting")
    assert not out.exists()
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


def test_what_is_kept_of_a_killed_conversion_does_not_count_as_written(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = stopped(checkpoint, tmp_path / "out")
    kept = sum(path.stat().st_size for path in sorted(folder.glob("*.safetensors"))[:2])
    written: list[int] = []
    found: list[int] = []
    convert_to_hf(
        checkpoint,
        tmp_path / "out",
        max_file_bytes=MAX_FILE_BYTES,
        on_start=lambda _total: written.append,
        on_kept=found.append,
    )
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert (len(found), sum(found)) == (2, kept)
    assert sum(written) == sum(sizes) - kept


def test_a_conversion_says_its_speed_of_what_it_wrote() -> None:
    progress = Progress(disable=True)
    work = _Work(progress=progress, task=progress.add_task("", total=None))
    work.on_kept(7 * 10**9)
    assert work.told(3.0) == (
        "0.00 GB of weights written in 3.0 s, 7.00 GB kept of a killed conversion"
    )
    work.on_start(8 * 10**9)(10**9)
    assert (progress.tasks[0].completed, progress.tasks[0].total) == (10**9, 10**9)
    assert work.told(4.0) == (
        "1.00 GB of weights written in 4.0 s (0.25 GB/s), 7.00 GB kept of a killed conversion"
    )


def test_other_settings_begin_anew_and_say_so(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped(checkpoint, tmp_path / "out")
    convert_to_hf(checkpoint, tmp_path / "out", torch.bfloat16, max_file_bytes=MAX_FILE_BYTES)
    assert "begins anew" in caplog.text
    assert {tensor.dtype for tensor in weights_in(tmp_path / "out").values()} == {torch.bfloat16}


def test_another_checkpoint_begins_anew_and_says_so(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped(checkpoint, tmp_path / "out")
    other = write_tiny_qwen3(tmp_path / "other-source", seed=1)
    convert_from_hf(other, tmp_path / "other")
    convert_to_hf(tmp_path / "other", tmp_path / "out", max_file_bytes=MAX_FILE_BYTES)
    assert "begins anew" in caplog.text
    assert all(
        torch.equal(tensor, weights_in(other)[name])
        for name, tensor in weights_in(tmp_path / "out").items()
    )


def test_a_finished_file_that_changed_is_written_again(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = stopped(checkpoint, tmp_path / "out")
    damaged = sorted(folder.glob("*.safetensors"))[1]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with caplog.at_level("INFO"):
        convert_to_hf(checkpoint, tmp_path / "out", max_file_bytes=MAX_FILE_BYTES)
    assert f"{damaged.name}: changed since it was finished" in caplog.text
    assert "kept 1 finished files" in caplog.text
    truth = weights_in(tmp_path / "source")
    assert all(torch.equal(t, truth[name]) for name, t in weights_in(tmp_path / "out").items())


@pytest.mark.parametrize("direction", ["to-hf", "from-hf"])
def test_an_interruption_is_told_as_such_at_once(
    checkpoint: Path, tmp_path: Path, direction: str
) -> None:
    convert, source = {
        "to-hf": (convert_to_hf, checkpoint),
        "from-hf": (convert_from_hf, tmp_path / "source"),
    }[direction]
    num_calls = 0

    def interrupt(_number: int) -> None:
        nonlocal num_calls
        num_calls += 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", on_start=lambda _total: interrupt)
    assert num_calls == 1


@pytest.mark.parametrize("how", ["place", "inode", "time"])
def test_another_source_with_the_same_names_sizes_and_times_begins_anew(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_tiny_qwen3(tmp_path / "source")
    path = source / "model.safetensors"
    with pytest.raises(StoppedError):
        convert_from_hf(
            source, tmp_path / "out", max_file_bytes=MAX_FILE_BYTES, on_start=stop_after(100_000)
        )
    other = write_tiny_qwen3(tmp_path / "other", seed=1)
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    os.utime(other / "model.safetensors", ns=times)
    if how == "inode":
        (other / "model.safetensors").replace(path)
    elif how == "time":
        path.write_bytes((other / "model.safetensors").read_bytes())
        os.utime(path, ns=times)
    taken = other if how == "place" else source
    convert_from_hf(taken, tmp_path / "out", max_file_bytes=MAX_FILE_BYTES)
    assert "begins anew" in caplog.text
    convert_to_hf(tmp_path / "out", tmp_path / "back")
    assert max_difference(weights_in(tmp_path / "back"), weights_in(taken)) == 0.0


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
def test_a_source_that_changes_during_the_conversion_is_refused(tmp_path: Path, name: str) -> None:
    source = write_tiny_qwen3(tmp_path / "source")

    def touch(_number: int) -> None:
        content = (source / name).read_bytes()
        (source / name).write_bytes(content if name.endswith(".safetensors") else content + b" ")

    with pytest.raises(CheckpointError, match="source: changed while it was converted"):
        convert_from_hf(source, tmp_path / "out", on_start=lambda _total: touch)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_checkpoint_that_retention_deletes_meanwhile_is_named(
    checkpoint: Path, tmp_path: Path
) -> None:
    """All its tensors are mapped by then: what is not there is no fault of the output's storage."""
    done: list[int] = []

    def delete(num_bytes: int) -> None:
        done.append(num_bytes)
        if sum(done) > 20_000:  # header and first tensor
            shutil.rmtree(checkpoint, ignore_errors=True)

    with pytest.raises(CheckpointError, match="checkpoint: was replaced or deleted while"):
        convert_to_hf(checkpoint, tmp_path / "out", on_start=lambda _total: delete)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_arrives_under_the_final_name_meanwhile_is_kept(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def fill(_number: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "precious").write_text("1")

    with pytest.raises(SaveError, match="out: came to hold something during the conversion"):
        convert_to_hf(checkpoint, out, on_start=lambda _total: fill)
    assert [path.name for path in out.iterdir()] == ["precious"]
    (out / "precious").unlink()
    convert_to_hf(checkpoint, out)  # in place of the empty folder
    assert weights_in(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out", "source"]


def test_a_link_and_the_working_folder_are_targets(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    convert_to_hf(checkpoint, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert weights_in(tmp_path / "target")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert_to_hf(checkpoint, Path())
    assert weights_in(tmp_path / "here")


def test_a_mount_point_is_refused_before_anything_is_written(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="/proc: is a mount point"):
        convert_to_hf(checkpoint, Path("/proc"))


IN_A_MOUNT = """
import pathlib, subprocess, sys
from prefixrl_mcore.checkpoint.convert.offline import convert_to_hf
checkpoint, out = map(pathlib.Path, sys.argv[1:])
subprocess.run(["mount", "--bind", out, out], check=True)
convert_to_hf(checkpoint, out)
"""


@pytest.mark.mount
def test_a_bind_mount_is_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path
) -> None:
    namespace = ["unshare", "--map-root-user", "--mount"]
    out, probe = tmp_path / "out", tmp_path / "probe"
    out.mkdir()
    probe.mkdir()
    tried = subprocess.run([*namespace, "mount", "--bind", probe, probe], capture_output=True)
    if tried.returncode != 0:
        pytest.skip(f"no mounts here: {tried.stderr.decode()}")
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [*namespace, sys.executable, "-c", IN_A_MOUNT, str(checkpoint), str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"{out}: is a mount point" in done.stderr
    assert sorted(tmp_path.iterdir()) == before
    assert not any(out.iterdir())


@pytest.mark.parametrize("direction", ["to-hf", "from-hf"])
def test_a_kill_after_the_last_rename_is_made_good(
    checkpoint: Path,
    tmp_path: Path,
    direction: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    convert, source = {
        "to-hf": (convert_to_hf, checkpoint),
        "from-hf": (convert_from_hf, tmp_path / "source"),
    }[direction]
    out, journal = tmp_path / "out", tmp_path / ".out.converting.json"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        convert(source, out)
    assert journal.is_file()
    inode = out.stat().st_ino
    with pytest.raises(CheckpointError, match="out: exists"):
        convert(source, out, torch.bfloat16)
    assert journal.is_file()
    convert(source, out)
    assert out.stat().st_ino == inode
    assert not journal.exists()


def test_what_a_killed_conversion_did_not_live_to_say_is_said(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        convert_to_hf(checkpoint, tmp_path / "out", torch.bfloat16)
    caplog.clear()
    convert_to_hf(checkpoint, tmp_path / "out", torch.bfloat16)
    assert "weights are bfloat16 but config.json, copied unchanged, says float32" in caplog.text


@pytest.mark.parametrize("content", ["[]", "{", '{"task": 1}', '{"task": 1, "files": []}'])
def test_a_journal_that_is_none_begins_anew(checkpoint: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / ".out.converting.json").write_text(content)
    convert_to_hf(checkpoint, tmp_path / "out")
    assert weights_in(tmp_path / "out")


def test_a_result_of_another_process_is_not_replaced(tmp_path: Path) -> None:
    folder = ResumableFolder(tmp_path / "out", {})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("1")
    with pytest.raises(CheckpointError, match="out: exists"):
        folder.__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_processes_do_not_write_one_folder(checkpoint: Path, tmp_path: Path) -> None:
    with ResumableFolder(tmp_path / "out", {}) as folder:
        with pytest.raises(CheckpointError, match="out: is being written by another process"):
            convert_to_hf(checkpoint, tmp_path / "out")
        assert folder.path.is_dir()


@pytest.mark.parametrize("is_made_anew", [False, True], ids=["removed", "made anew"])
def test_a_folder_that_another_process_removed_before_the_lock_is_locked_where_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_made_anew: bool
) -> None:
    folder = ResumableFolder(tmp_path / "out", {})
    locks: list[int] = []

    def remove_and_lock(descriptor: int, operation: int) -> None:
        locks.append(descriptor)
        if len(locks) == 1:
            shutil.rmtree(folder.path)
            if is_made_anew:
                folder.path.mkdir()
        flock(descriptor, operation)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    with folder:
        assert len(locks) == 2
        with pytest.raises(CheckpointError, match="is being written by another process"):
            ResumableFolder(tmp_path / "out", {}).__enter__()


def test_what_the_storage_did_not_give_back_does_not_cost_the_finished_files(
    tmp_path: Path,
) -> None:
    def convert(error: Exception) -> None:
        with ResumableFolder(tmp_path / "out", {}) as folder:
            (folder.path / "one").write_text("1")
            folder.finish("one", size_bytes=1, sha256=SHA_OF_1)
            raise error

    with pytest.raises(StorageReadError):
        convert(StorageReadError("did not answer"))
    assert (tmp_path / ".out.converting" / "one").read_text() == "1"
    with pytest.raises(CheckpointError):
        convert(CheckpointError("is damaged"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("length", [240, 300])
def test_a_name_that_is_too_long_is_bad_input(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be written, got .*File name too long"):
        convert_to_hf(tmp_path, tmp_path / ("n" * length))


IN_A_CLOSED_FOLDER = """
import pathlib, sys
from prefixrl_mcore.checkpoint.resumable import refuse_existing
refuse_existing(pathlib.Path(sys.argv[1]))
"""


def test_a_folder_that_may_be_entered_but_not_read_has_room_for_a_target(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "out").mkdir(parents=True)
    closed.chmod(0o311)
    command = [sys.executable, "-c", IN_A_CLOSED_FOLDER, str(closed / "out")]
    if os.geteuid() == 0:  # root may read everything, unless it gives that up
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    (closed / "out").chmod(0o311)
    refused = subprocess.run(command, capture_output=True, text=True)
    closed.chmod(0o711)
    assert done.returncode == 0, done.stderr
    assert "CheckpointError" in refused.stderr
    assert "out: cannot be written, got [Errno 13] Permission denied" in refused.stderr


def test_leftovers_of_a_journal_are_removed_whatever_the_name(tmp_path: Path) -> None:
    leftover = tmp_path / "..a[1].converting.json.tmp-7"
    leftover.write_text("{")
    with ResumableFolder(tmp_path / "a[1]", {}):
        assert not leftover.exists()


def test_bad_input_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    data = checkpoint / "megatron" / "__0_1.distcp"
    content = bytearray(data.read_bytes())
    content[-5000] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_1\.distcp: content is damaged, got CRC-32"):
        convert_to_hf(checkpoint, tmp_path / "out", max_file_bytes=MAX_FILE_BYTES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "source"]


@pytest.mark.parametrize("direction", ["to-hf", "from-hf"])
def test_a_file_that_cannot_be_copied_is_told_before_any_weight_is_written(
    checkpoint: Path, tmp_path: Path, direction: str
) -> None:
    convert, source, assets = {
        "to-hf": (convert_to_hf, checkpoint, checkpoint / "hf"),
        "from-hf": (convert_from_hf, tmp_path / "source", tmp_path / "source"),
    }[direction]
    with pytest.raises(StoppedError):
        convert(
            source, tmp_path / "out", max_file_bytes=MAX_FILE_BYTES, on_start=stop_after(100_000)
        )
    before = sorted(tmp_path.rglob("*"))
    link = assets / "added.json"
    link.symlink_to("blobs/gone")
    with pytest.raises(CheckpointError, match=r"added\.json: is a link to blobs/gone, which does"):
        convert(
            source,
            tmp_path / "out",
            max_file_bytes=MAX_FILE_BYTES,
            on_start=stop_after(0),
        )
    link.unlink()
    assert sorted(tmp_path.rglob("*")) == before  # above all the finished files


@pytest.mark.parametrize("direction", ["to-hf", "from-hf"])
def test_a_storage_that_refuses_is_named_and_what_is_finished_is_kept(
    checkpoint: Path, tmp_path: Path, direction: str
) -> None:
    convert, source, suffix = {
        "to-hf": (convert_to_hf, checkpoint, ".safetensors"),
        "from-hf": (convert_from_hf, tmp_path / "source", ".distcp"),
    }[direction]
    out = tmp_path / "out"
    # One file of half the size fits, and one of all weights does not.
    with no_file_above(200_000):
        with pytest.raises(SaveError, match=rf"{suffix}: the storage refused: .*File too large"):
            convert(source, out, max_file_bytes=10**9)
        assert not out.exists()
        convert(source, out, max_file_bytes=100_000)
    assert out.is_dir()


def test_an_error_of_the_storage_keeps_the_finished_files(tmp_path: Path) -> None:
    def fail() -> None:
        with ResumableFolder(tmp_path / "out", {"a": 1}) as folder:
            (folder.path / "one").write_text("1")
            folder.finish("one", size_bytes=1, sha256=SHA_OF_1)
            (folder.path / "two").write_text("2")
            raise SaveError("full")

    with pytest.raises(SaveError, match="full"):
        fail()
    with ResumableFolder(tmp_path / "out", {"a": 1}) as folder:
        assert list(folder.finished) == ["one"]
        assert not (folder.path / "two").exists()
        folder.seal(with_manifest=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["one"]


SHA_OF_1 = "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
