import hashlib
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefixrl_mcore.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    ManifestEntry,
    begin_folder,
    clean_temporaries,
    read_manifest,
    remove_folder,
    seal_folder,
    verify,
)
from prefixrl_mcore.checkpoint.retention import KEEP_ALL
from prefixrl_mcore.checkpoint.run_checkpoints import (
    clean_up,
    latest_checkpoint,
    publish,
    step_folder,
)


def write_example(final: Path, text: str = "weights") -> Path:
    folder = begin_folder(final)
    (folder / "inner").mkdir()
    (folder / "inner" / "data.bin").write_text(text)
    (folder / "empty").write_bytes(b"")
    seal_folder(folder, final)
    return final


def hidden_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_sealed_folder_lists_every_file_with_its_known_digest(tmp_path: Path) -> None:
    manifest = verify(write_example(tmp_path / "step-1", "abc"))
    assert sorted(manifest.files) == ["empty", "inner/data.bin"]
    entry = manifest.files["inner/data.bin"]
    assert entry.size_bytes == 3
    # SHA-256 of "abc", from the standard's own example.
    assert entry.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hidden_names(tmp_path) == []


def test_a_file_that_lost_what_was_written_to_it_is_not_sealed(tmp_path: Path) -> None:
    final = tmp_path / "step-1"
    temporary = begin_folder(final)
    (temporary / "data.bin").write_text("ab")
    known = {"data.bin": ManifestEntry(size_bytes=3, sha256=hashlib.sha256(b"abc").hexdigest())}
    with pytest.raises(OSError, match=r"data\.bin: got 2 bytes, expected the 3 that were written"):
        seal_folder(temporary, final, known=known)
    assert not final.exists()
    (temporary / "data.bin").write_text("abc")
    seal_folder(temporary, final, known=known)
    assert verify(final).files == known


@pytest.mark.parametrize(
    ("damage", "got"),
    [
        pytest.param(lambda f: (f / "inner/data.bin").write_text("weightz"), "sha256", id="flip"),
        pytest.param(lambda f: (f / "inner/data.bin").write_text("weight"), "6 bytes", id="short"),
        pytest.param(lambda f: (f / "inner/data.bin").write_text("weights!"), "8 bytes", id="long"),
        pytest.param(lambda f: (f / "inner/data.bin").unlink(), "is missing", id="missing"),
    ],
)
def test_verify_names_the_damaged_file_and_what_was_expected(
    damage: Callable[[Path], object], got: str, tmp_path: Path
) -> None:
    folder = write_example(tmp_path / "step-1")
    damage(folder)
    with pytest.raises(CheckpointError, match=rf"inner/data\.bin.*{got}.*expected") as error:
        verify(folder)
    assert "use another checkpoint" in str(error.value)


def test_sizes_alone_find_truncation_but_not_a_flipped_byte(tmp_path: Path) -> None:
    folder = write_example(tmp_path / "step-1")
    (folder / "inner/data.bin").write_text("weightz")
    verify(folder, checksums=False)
    (folder / "inner/data.bin").write_text("weight")
    with pytest.raises(CheckpointError, match="6 bytes, expected 7"):
        verify(folder, checksums=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{", "is damaged", id="not JSON"),
        pytest.param("[]", "is damaged", id="not an object"),
        pytest.param("{}", "is damaged", id="no version"),
        pytest.param('{"format_version": 99}', "got format_version 99, expected 1", id="newer"),
    ],
)
def test_a_bad_manifest_is_refused(text: str, message: str, tmp_path: Path) -> None:
    folder = write_example(tmp_path / "step-1")
    (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(folder)


def test_a_folder_without_a_manifest_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json: is missing"):
        verify(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        verify(tmp_path / "nowhere")


def test_writing_again_replaces_the_whole_folder(tmp_path: Path) -> None:
    folder = write_example(tmp_path / "step-1", "old")
    temporary = begin_folder(folder)
    (temporary / "other").write_text("new")
    seal_folder(temporary, folder)
    assert list(verify(folder).files) == ["other"]
    assert not (folder / "inner").exists()
    assert hidden_names(tmp_path) == []


def test_the_next_writer_of_a_name_removes_its_stale_temporaries_only(tmp_path: Path) -> None:
    begin_folder(tmp_path / "step-1")
    other = begin_folder(tmp_path / "step-2")
    write_example(tmp_path / "step-1")
    assert hidden_names(tmp_path) == [other.name]
    clean_temporaries(tmp_path)
    assert hidden_names(tmp_path) == []


def test_a_parent_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        begin_folder(tmp_path / "file" / "step-1")


def test_removing_leaves_nothing(tmp_path: Path) -> None:
    remove_folder(write_example(tmp_path / "step-1"))
    assert list(tmp_path.iterdir()) == []


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(CheckpointError("step-1: bad")))
    assert isinstance(error, CheckpointError)
    assert isinstance(error, ValueError)
    assert str(error) == "step-1: bad"


# Saves in a forked child that kills itself for good at the n-th file-system operation that Python
# is about to make inside the folder: a loop over n visits every moment between two of them.
SAVES_AND_DIES = """
import os, signal, sys
from pathlib import Path
from prefixrl_mcore.checkpoint import manifest, run_checkpoints
from prefixrl_mcore.checkpoint.retention import Retention

def save(folder, step, text, keep_last, num_left):
    left = int(num_left)

    def watch(event, args):
        nonlocal left
        if event.split(".")[0] in ("open", "os", "shutil") and any(folder in str(a) for a in args):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(watch)
    final = run_checkpoints.step_folder(Path(folder), int(step))
    temporary = manifest.begin_folder(final)
    (temporary / "data").write_text(text)
    kept = None if keep_last == "all" else int(keep_last)
    run_checkpoints.publish(temporary, final, Retention(keep_last=kept))

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            save(*line.split())
            os._exit(0)
        except BaseException:
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def save_and_die() -> Iterator[Callable[..., bool]]:
    """Return a function that says whether the save came to its end before the kill."""
    command = [sys.executable, "-c", SAVES_AND_DIES]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def call(folder: Path, step: int, text: str, keep_last: str, num_left: int) -> bool:
            process.stdin.write(f"{folder} {step} {text} {keep_last} {num_left}\n")  # pyright: ignore[reportOptionalMemberAccess]
            process.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]
            code = int(process.stdout.readline())  # pyright: ignore[reportOptionalMemberAccess]
            assert code in (0, -9)
            return code == 0

        yield call
        process.stdin.close()


@pytest.mark.parametrize(
    ("step", "keep_last"),
    [pytest.param(2, "1", id="next step"), pytest.param(1, "all", id="same step again")],
)
def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(
    step: int, keep_last: str, save_and_die: Callable[..., bool], tmp_path: Path
) -> None:
    outcomes: list[str] = []
    for num_left in range(1000):
        folder = tmp_path / str(num_left)
        temporary = begin_folder(step_folder(folder, 1))
        (temporary / "data").write_text("old")
        publish(temporary, step_folder(folder, 1), KEEP_ALL)

        has_finished = save_and_die(folder, step, "new", keep_last, num_left)

        clean_up(folder)
        latest = latest_checkpoint(folder)
        assert latest is not None, num_left
        for path in folder.glob("step-*"):  # nothing half-deleted under a checkpoint's name
            verify(path)
        outcomes.append((latest / "data").read_text())
        assert hidden_names(folder) == [], num_left
        if has_finished:
            break
        assert save_and_die(folder, step, "later", keep_last, 10**6)
        latest = latest_checkpoint(folder)
        assert latest is not None
        assert (latest / "data").read_text() == "later"
    assert len(outcomes) > 15  # the loop did visit many moments
    assert outcomes[0] == "old"
    assert outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, reverse=True)  # old until some moment, new from then on


def test_seal_without_manifest_still_renames_in_one_step(tmp_path: Path) -> None:
    temporary = begin_folder(tmp_path / "model")
    (temporary / "config.json").write_text("{}")
    seal_folder(temporary, tmp_path / "model", with_manifest=False)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
