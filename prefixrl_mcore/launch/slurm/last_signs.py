"""Where the ranks of a job were when it failed: their heartbeats, and reports of hangs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefixrl_mcore.launch.slurm.job_folder import JobFolder
from prefixrl_mcore.launch.slurm.layout import TRAINER
from prefixrl_mcore.observability.heartbeat import read_beats, stall_reports
from prefixrl_mcore.observability.run_folder import RunFolder
from prefixrl_mcore.observability.stall_report import Beat

_SHOWN_TASKS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class LastSigns:
    """What the last start of a job left behind in the run folder."""

    beats: dict[int, Beat]
    """Last heartbeat of each rank that wrote one in this start."""

    silent: list[str]
    """Trainer tasks that did not say how they ended: killed, or on a lost node."""

    reports: list[Path]
    """The watchdog's reports of this start, the oldest first."""

    def place_of(self, task: str) -> str:
        """Return where a task was last seen, to follow a comma; empty if it is not known."""
        role, _, rank = task.rpartition("-")
        beat = self.beats.get(int(rank)) if role == TRAINER else None
        if beat is None:
            return ""
        return f", last seen in phase {beat.phase}" + (f" of {beat.step}" if beat.step else "")

    def word_of(self, task: str, fate: str = "was killed, or its node is lost") -> str:
        """Return what is said of a task without a word."""
        beat = self.beats.get(int(task.rpartition("-")[2]))
        node = "" if beat is None else f" on {beat.host}"
        return f"{task}{node} {fate}{self.place_of(task)}"

    def lines(self, tasks: Sequence[str]) -> list[str]:
        """Return what is said of tasks without a word, and of hangs."""
        lines = [self.word_of(task) for task in tasks[:_SHOWN_TASKS]]
        if len(tasks) > _SHOWN_TASKS:
            lines.append(f"... and {len(tasks) - _SHOWN_TASKS} more tasks, likewise")
        lines += [f"ranks hung; their stacks, and who was late: {file}" for file in self.reports]
        return lines


def last_signs(folder: JobFolder) -> LastSigns:
    """Return what is known of the last start; nothing of a start whose tasks never began."""
    starts = folder.starts()
    begun = folder.begin_of(starts[-1]) if starts else None
    if begun is None:
        return LastSigns(beats={}, silent=[], reports=[])
    task = folder.read_task()
    heartbeats = RunFolder(Path(task.working_directory, task.run_folder)).heartbeats
    return LastSigns(
        beats={beat.rank: beat for beat in read_beats(heartbeats) if beat.time >= begun},
        silent=sorted(
            (log.stem for log in starts[-1].glob("trainer-*.log") if not _has_ended(log)),
            key=lambda name: int(name.rpartition("-")[2]),
        ),
        reports=[file for file in stall_reports(heartbeats) if file.stat().st_mtime >= begun],
    )


def _has_ended(log: Path) -> bool:
    """Return whether the task of a log has said how it ended."""
    return log.with_name(f"{log.stem}.end.json").exists()
