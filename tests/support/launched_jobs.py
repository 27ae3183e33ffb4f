"""Jobs of any program, submitted to the local cluster as ``prefixrl launch`` submits a run."""

import io
from collections.abc import Callable
from pathlib import Path

from prefixrl_mcore.config.site import SiteConfig
from prefixrl_mcore.launch.slurm.follow import follow
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, TaskFile
from prefixrl_mcore.launch.slurm.layout import JobLayout
from prefixrl_mcore.launch.slurm.sites import load_site
from prefixrl_mcore.launch.slurm.submission import describe, submit
from tests.support.tiny_run import ROOT, TinyTask
from tests.support.waiting import wait_until


def colocated(nodes: int, ranks_per_node: int) -> JobLayout:
    """Return the layout of a job whose nodes are all alike."""
    return JobLayout(
        shape="colocated",
        trainer_nodes=nodes,
        ranks_per_node=ranks_per_node,
        rollout_nodes=0,
        servers_per_node=0,
        rollout_gpus_per_node=0,
    )


def tiny_settings(tiny: TinyTask, run_folder: Path) -> list[str]:
    """Return the settings of a tiny run on two tensor-parallel ranks; how long is not said."""
    return [
        f"run_folder={run_folder}",
        f"model.path={tiny.folder / 'base'}",
        f"data.problems={tiny.folder / 'train.jsonl'}",
        f"data.held_out.held-out={tiny.folder / 'held_out.jsonl'}",
        f"data.traces={tiny.folder / 'traces'}",
        f"data.prefixes={tiny.folder / 'prefixes'}",
        "policy.parallel.tensor_model_parallel_size=2",
        "rollout.engine=transformers",
        *("batch.prompts_per_step=4", "batch.group_size=4", "batch.stream_tokens=256"),
        *("rollout.max_total_tokens=64", "rollout.max_completion_tokens=32"),
        *("evaluation.num_samples=2", "evaluation.training_num_samples=2"),
        "evaluation.unlock_num_samples=2",
    ]


def submit_program(
    layout: JobLayout, *commands: list[str], name: str = "program", site: SiteConfig | None = None
) -> tuple[JobFolder, str]:
    """Submit other programs than the trainer's in a layout; return folder and number."""
    site = site or load_site("ci-local")
    job = prepare_program(site, layout, *commands, name=name)
    submit(site, [job])
    assert job.job_id is not None
    return job, job.job_id


def prepare_program(
    site: SiteConfig,
    layout: JobLayout,
    *commands: list[str],
    name: str = "program",
    after: JobFolder | None = None,
    config: str = "",
) -> JobFolder:
    """Write a job of other programs than the trainer's, which waits for ``after``.

    A word ``JOB_FOLDER`` of a command becomes the job's folder. ``config`` is for tasks of a role.
    """
    job = JobFolder.make(site.job_folder, name)
    task = TaskFile(
        config=config,
        run_folder="",
        working_directory=str(ROOT),
        is_resumed=False,
        num_servers=layout.server_nodes * layout.servers_per_node,
        gpus_per_server=0,
        shares_nodes=layout.shares_nodes,
    )
    submission = describe(name, site, layout, job, dry_run=False, after=after)
    for step, command in zip(submission["tasks"], commands, strict=True):
        step["command"] = [str(job.path) if word == "JOB_FOLDER" else word for word in command]
    job.write(task, submission)
    return job


def end_of(job: JobFolder) -> tuple[int, str]:
    """Wait for a job's end; return the exit code of ``launch`` and what was shown."""
    assert job.job_id is not None
    said = io.StringIO()
    return follow(job, job.job_id, out=said), said.getvalue()


def wait_for(happens: Callable[[], bool], *, seconds: float = 180) -> None:
    """Wait until something happens; a loaded machine needs a minute to begin a task."""
    wait_until(happens, seconds=seconds, poll_seconds=0.1)
