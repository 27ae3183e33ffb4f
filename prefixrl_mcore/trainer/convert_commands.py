"""``prefixrl convert to-hf | from-hf``: conversion with progress, speed and memory shown."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import Progress, TaskID

from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf, convert_to_hf
from prefixrl_mcore.observability.memory import MemoryWatch
from prefixrl_mcore.observability.progress import byte_progress

_DTYPES = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}
_SIZE = TypeAdapter(ByteSize)


@dataclass(kw_only=True, slots=True)
class _Work:
    """What a conversion did, and the bar that shows it."""

    progress: Progress
    """Where the bar is."""

    task: TaskID
    """The bar."""

    num_bytes: int = 0
    """Bytes of all weights; 0 before it is known."""

    num_written_bytes: int = 0
    """Bytes of weight files that this call wrote."""

    num_kept_bytes: int = 0
    """Bytes of weight files that a killed conversion had finished."""

    def on_start(self, total: int) -> Callable[[int], object]:
        """Take the bytes of all weights; return what counts those that are written."""
        self.num_bytes = total
        self._show_rest()
        return self._on_written

    def on_kept(self, number: int) -> None:
        """Count a file that was there."""
        self.num_kept_bytes += number
        self._show_rest()

    def _show_rest(self) -> None:
        """Let the bar be of what is to be written, so that its speed is that of writing."""
        self.progress.update(self.task, total=max(0, self.num_bytes - self.num_kept_bytes))

    def _on_written(self, number: int) -> None:
        self.num_written_bytes += number
        self.progress.advance(self.task, number)

    def told(self, seconds: float) -> str:
        """Return what was done in that time, in words; the rate is of what was written."""
        written = self.num_written_bytes / 1e9
        text = f"{written:.2f} GB of weights written in {seconds:.1f} s"
        if self.num_written_bytes:
            text += f" ({written / seconds:.2f} GB/s)"
        if self.num_kept_bytes:
            text += f", {self.num_kept_bytes / 1e9:.2f} GB kept of a killed conversion"
        return text


def run_to_hf(checkpoint: Path, out: Path, *, dtype: str | None, file_size: str) -> None:
    """Convert a checkpoint to a Hugging Face folder and say what it took.

    Args:
        checkpoint: a checkpoint, or a folder of checkpoints.
        out: folder to make.
        dtype: ``bf16``, ``fp32`` or None for the checkpoint's own.
        file_size: such as ``5GB``, size above which a new weight file is begun.

    Raises:
        ValueError: as ``convert_to_hf``, or if the size is not one.
    """
    max_file_bytes = parse_size(file_size)
    with _shown("to-hf", out) as work:
        convert_to_hf(
            checkpoint,
            out,
            _DTYPES[dtype],
            max_file_bytes=max_file_bytes,
            on_start=work.on_start,
            on_kept=work.on_kept,
        )


def run_from_hf(model: Path, out: Path, *, dtype: str | None, file_size: str) -> None:
    """Convert a Hugging Face folder to a checkpoint and say what it took.

    Args:
        model: Hugging Face folder.
        out: checkpoint folder to make.
        dtype: ``bf16``, ``fp32`` or None for the folder's own.
        file_size: such as ``5GB``, size above which a new data file is begun.

    Raises:
        ValueError: as ``convert_from_hf``, or if the size is not one.
    """
    max_file_bytes = parse_size(file_size)
    with _shown("from-hf", out) as work:
        convert_from_hf(
            model,
            out,
            _DTYPES[dtype],
            max_file_bytes=max_file_bytes,
            on_start=work.on_start,
            on_kept=work.on_kept,
        )


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``5GB``, ``500 MB`` or ``4GiB``.

    Raises:
        ValueError: if it is no size of at least one byte.
    """
    try:
        size = int(_SIZE.validate_python(text))
    except ValidationError:
        size = 0
    if size < 1:
        raise ValueError(f"size {text!r}: expected a number of bytes such as 5GB or 500MB")
    return size


@contextmanager
def _shown(direction: str, out: Path) -> Iterator[_Work]:
    """Show progress, and at the end bytes, seconds and memory."""
    console = Console(stderr=True)
    progress = byte_progress(console)
    work = _Work(progress=progress, task=progress.add_task(f"{direction} {out.name}", total=None))
    start = time.perf_counter()
    with progress, MemoryWatch() as memory:
        yield work
    seconds = time.perf_counter() - start
    console.print(
        f"{out}: {work.told(seconds)}, peak memory "
        f"{memory.peak_bytes / 1e9:.2f} GB ({memory.start_bytes / 1e9:.2f} GB before it began)",
        highlight=False,
        soft_wrap=True,
    )
