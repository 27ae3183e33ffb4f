"""``prefixrl launch --recipe`` and ``--sweep``: several jobs, followed together to one summary."""

import itertools
import logging
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.launch.slurm.end_report import report_end
from prefixrl_mcore.launch.slurm.job_folder import JobFolder
from prefixrl_mcore.launch.slurm.launch import (
    LaunchOptions,
    all_or_none,
    begin_with_init,
    prepare_run,
    provide_init,
    read_run,
)
from prefixrl_mcore.launch.slurm.layout import RECIPE, TRAINER
from prefixrl_mcore.launch.slurm.states import JobState, job_state
from prefixrl_mcore.launch.slurm.submission import submit
from prefixrl_mcore.launch.slurm.waiting import JobWatch

logger = logging.getLogger(__name__)

_POLL_SECONDS = 3.0

Job = tuple[str, JobFolder]
"""What it is called in the summary, and its folder."""


def launch_recipe(
    config_file: Path, settings: Sequence[str], site_name: str, how: LaunchOptions
) -> int:
    """Submit all stages of a run, each after the one before has completed; return as ``launch``.

    A stage that fails cancels those behind it.

    Raises:
        ConfigError: as ``launch``.
        SlurmError: if a submission fails; what was submitted before it is cancelled.
    """
    site, config = read_run(config_file, settings, site_name)
    config = begin_with_init(config, settings, how)
    name = how.name or config.run_folder.name
    with all_or_none() as folders:
        after: JobFolder | None = None
        for stage, needs_gpus in RECIPE.items():
            own_site = site if needs_gpus else site.without_gpus()
            own = replace(how, name=f"{name}.{'train' if stage == TRAINER else stage}")
            after = prepare_run(config, own_site, own, stage=stage, after=after)
            folders.append(after)
        provide_init(config, how)
    submit(site, folders)
    return _end(list(zip(RECIPE, folders, strict=True)), how)


def launch_sweep(
    config_file: Path,
    settings: Sequence[str],
    site_name: str,
    how: LaunchOptions,
    sweep: Sequence[str],
) -> int:
    """Submit one run for each combination of values; return as ``launch``.

    Each has a run folder of its own, named after its values.

    Args:
        config_file: the config that they share.
        settings: on top of it, for all.
        site_name: name or path of a site profile.
        how: everything else.
        sweep: ``key=value,value,...`` each.

    Raises:
        ConfigError: as ``launch``, before anything is submitted.
        SlurmError: if a submission fails; what was submitted before it is cancelled.
    """
    site, base = read_run(config_file, settings, site_name)
    base = begin_with_init(base, [*settings, *sweep], how)
    # All runs read what was collected for the run that they are variants of, and its model.
    shared = [f"data.traces={base.traces_folder}", f"data.prefixes={base.prefixes_folder}"]
    if how.init is not None:
        shared.append(f"model.path={base.model.path}")
    runs = []
    for point in sweep_points(sweep):
        label = " ".join(point)
        run_folder = base.run_folder.with_name(f"{base.run_folder.name}-{folder_suffix(point)}")
        own_settings = [*shared, *settings, *point, f"run_folder={run_folder}"]
        _, config = read_run(config_file, own_settings, site_name)
        runs.append((label, config))
    run_folders = [config.run_folder for _, config in runs]
    if len(set(run_folders)) < len(runs):
        raise ConfigError(
            f"--sweep: two runs would have one folder: {sorted(map(str, run_folders))}"
        )
    with all_or_none() as folders:
        for _, config in runs:
            own = replace(how, name=config.run_folder.name)
            folders.append(prepare_run(config, site, own))
        provide_init(base, how)
    submit(site, folders)
    return _end([(label, job) for (label, _), job in zip(runs, folders, strict=True)], how)


def sweep_points(sweep: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the settings of each run: all combinations of ``key=value,value,...``.

    Raises:
        ConfigError: if one has no key, or fewer than two values.
    """
    axes = []
    for text in sweep:
        key, _, values = text.partition("=")
        if key == "run_folder":
            raise ConfigError(
                f"--sweep {text}: each run has a folder of its own, named after its values"
            )
        given = [value for value in values.split(",") if value]
        if not key or len(given) < 2:
            raise ConfigError(
                f"--sweep {text}: expected key=value,value,... with two or more values"
            )
        axes.append([f"{key}={value}" for value in given])
    return list(itertools.product(*axes))


def folder_suffix(point: Sequence[str]) -> str:
    """Return what the folder of a run is called after its settings: ``lr-1e-6-seed-2``."""
    settings = [setting.partition("=") for setting in point]
    words = [f"{key.rpartition('.')[2]}-{value}" for key, _, value in settings]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words))


def follow_all(
    jobs: Sequence[Job],
    *,
    ask: Callable[[str], JobState] = job_state,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Log the states of jobs until all have ended, then print a summary.

    Returns:
        0 if all completed, else the exit code of the first in order that failed by itself.
    """
    watches = {
        label: JobWatch(str(folder.job_id), folder, name=label, ask=ask) for label, folder in jobs
    }
    ended: dict[str, JobState] = {}
    while len(ended) < len(jobs):
        for label, folder in jobs:
            state = None if label in ended else watches[label].look()
            if state is not None:
                ended[label] = state
                if state.is_known:
                    folder.write_final(state)
                    report_end(folder, str(folder.job_id), state, sleep=sleep)
        sleep(_POLL_SECONDS)
    _print_summary(jobs, ended)
    results = [ended[label] for label, _ in jobs]
    failed = [s.result for s in results if s.result and s.state != "CANCELLED"]
    return next(iter([*failed, *(s.result for s in results if s.result)]), 0)


def _end(jobs: Sequence[Job], how: LaunchOptions) -> int:
    """Show scripts, leave the jobs alone, or follow them, as was asked."""
    if how.dry_run:
        logger.info("dry run: nothing is submitted")
        for label, folder in jobs:
            sys.stdout.write(f"# {label}: {folder.script}\n{folder.script.read_text()}\n")
        return 0
    if how.detach:
        return 0
    try:
        return follow_all(jobs)
    except KeyboardInterrupt:
        numbers = ", ".join(str(folder.job_id) for _, folder in jobs)
        jobs_folder = jobs[0][1].path.parent
        logger.warning("jobs %s go on; prefixrl jobs list --jobs %s", numbers, jobs_folder)
        return 130


def _print_summary(jobs: Sequence[Job], ended: dict[str, JobState]) -> None:
    """Print one line per job."""
    table = Table(title="summary")
    for column in ("what", "job", "state", "restarts", "nodes", "folder"):
        table.add_column(column, overflow="fold")
    for label, folder in jobs:
        state = ended[label]
        told = state.state + (f" ({state.exit_code})" if state.exit_code else "")
        restarts = str(state.num_restarts)
        table.add_row(label, folder.job_id, told, restarts, state.nodes, folder.path.name)
    Console().print(table, highlight=False, markup=False)
