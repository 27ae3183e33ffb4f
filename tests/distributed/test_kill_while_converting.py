"""A conversion is killed (SIGKILL) at every stage; repeated, it goes on from what was finished."""

import os
import signal
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
from torch.multiprocessing.spawn import ProcessException

from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf, convert_to_hf
from prefixrl_mcore.checkpoint.manifest import verify
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import write_tiny_qwen3
from tests.support.weights import weights_in

MAX_FILE_BYTES = 60_000
HALF_A_FILE = 100_000  # in the third file to Hugging Face, in the second one back

Stage = tuple[str, str]
"""Audit event before which the process dies, and a pattern of the path that the event names."""

TO_HF: dict[str, tuple[Stage, int]] = {
    "first file": (("open", "*model-00001*"), 0),
    "name of the journal": (("os.rename", "*.converting.json.tmp*"), 0),
    "half a file": (("bytes", ""), 2),
    "last file": (("open", "*model-00007*"), 6),
    "index": (("open", "*index.json*"), 7),
    "tokenizer": (("open", "*.converting/tokenizer.json"), 7),
    "name of the folder": (("os.rename", "*/.out.converting"), 7),
}
FROM_HF: dict[str, tuple[Stage, int]] = {
    "first file": (("open", "*__0_1.distcp*"), 0),
    "half a file": (("bytes", ""), 1),
    "last file": (("open", "*__0_6.distcp*"), 5),
    "index": (("open", "*.metadata*"), 6),
    "state": (("open", "*trainer.json*"), 6),
    "manifest": (("open", "*manifest.json*"), 6),
    "name of the folder": (("os.rename", "*/.out.converting"), 6),
}
"""Stage, and how many finished files it leaves."""
LAST_JOURNAL: Stage = ("os.remove", "*/.out.converting.json")
"""The folder has its name, the journal beside it is still there."""


def convert(direction: str, source: Path, out: Path, on_bytes: Callable[[int], object]) -> None:
    run = {"to-hf": convert_to_hf, "from-hf": convert_from_hf}[direction]
    run(source, out, max_file_bytes=MAX_FILE_BYTES, on_start=lambda _total: on_bytes)


def convert_and_die(rank: int, direction: str, source: Path, out: Path, stage: Stage) -> None:
    """Convert, and kill this process when it is about to do what the stage says."""
    wanted, pattern = stage
    num_bytes = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == wanted and any(fnmatch(str(argument), pattern) for argument in arguments):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_bytes(number: int) -> None:
        nonlocal num_bytes
        num_bytes += number
        if wanted == "bytes" and num_bytes > HALF_A_FILE:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    convert(direction, source, out, on_bytes)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    model = write_tiny_qwen3(folder / "model", tie_word_embeddings=False)
    convert_from_hf(model, folder / "checkpoint")
    return {"to-hf": folder / "checkpoint", "from-hf": model}


@pytest.fixture(scope="module")
def undisturbed(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    for direction, source in sources.items():
        convert(direction, source, folder / direction, lambda _number: None)
    return {direction: contents(folder / direction) for direction in sources}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file but the manifest, which tells the time."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("manifest.json", "__0_0.distcp")
    }


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Return what a file keeps unless it is written again."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.suffix in (".safetensors", ".distcp")
    }


@pytest.mark.parametrize("direction", ["to-hf", "from-hf"])
def test_a_conversion_killed_after_its_last_rename_is_finished_by_the_next(
    sources: dict[str, Path],
    undisturbed: dict[str, dict[str, bytes]],
    tmp_path: Path,
    direction: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, out = sources[direction], tmp_path / "out"
    with pytest.raises(ProcessException):
        run_on_ranks(convert_and_die, direction, source, out, LAST_JOURNAL, world_size=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.converting.json", "out"]
    assert contents(out) == undisturbed[direction]
    before = identities(out)

    with caplog.at_level("INFO"):
        convert(direction, source, out, lambda _number: None)

    assert "was finished by a killed conversion" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(out) == undisturbed[direction]
    assert identities(out) == before


@pytest.mark.parametrize(
    ("direction", "name"),
    [("to-hf", name) for name in TO_HF] + [("from-hf", name) for name in FROM_HF],
)
def test_a_conversion_killed_at_any_stage_goes_on_from_its_finished_files(
    sources: dict[str, Path],
    undisturbed: dict[str, dict[str, bytes]],
    tmp_path: Path,
    direction: str,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage, num_finished = {"to-hf": TO_HF, "from-hf": FROM_HF}[direction][name]
    source, out = sources[direction], tmp_path / "out"
    with pytest.raises(ProcessException):
        run_on_ranks(convert_and_die, direction, source, out, stage, world_size=1)
    assert not out.exists()
    before = identities(tmp_path / ".out.converting")

    with caplog.at_level("INFO"):
        convert(direction, source, out, lambda _number: None)

    assert (f"kept {num_finished} finished files" in caplog.text) == (num_finished > 0)
    after = identities(out)
    kept = {file for file in after if before.get(file) == after[file]}
    assert len(kept) == num_finished
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(out) == undisturbed[direction]
    if direction == "from-hf":
        verify(out)
    else:
        assert weights_in(out)
