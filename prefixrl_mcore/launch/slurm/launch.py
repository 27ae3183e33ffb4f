"""``prefixrl launch``: from a config and a site to a job, checked before anything is submitted."""

import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prefixrl_mcore.config.base import ConfigError, validate
from prefixrl_mcore.config.load import dump_json, read_config_file, with_settings
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.config.server_gpus import check_server_gpus
from prefixrl_mcore.config.site import SiteConfig
from prefixrl_mcore.launch.check import check_layout, input_paths, read_shape
from prefixrl_mcore.launch.slurm.follow import follow
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, TaskFile
from prefixrl_mcore.launch.slurm.layout import (
    ONE_TASK,
    RECIPE,
    TRAINER,
    JobLayout,
    Shape,
    explain,
    lay_out,
)
from prefixrl_mcore.launch.slurm.mounts import (
    check_mounts,
    needed_paths,
    paths_on_nodes,
    warn_of_interpreters,
)
from prefixrl_mcore.launch.slurm.sites import load_site
from prefixrl_mcore.launch.slurm.submission import describe, submit
from prefixrl_mcore.observability.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchOptions:
    """What the command line says beside config and site."""

    shape: Shape = "colocated"
    """Where rollouts are made."""

    nodes: int | None = None
    """Nodes in all, to be checked; None takes what the config needs."""

    rollout_nodes: int | None = None
    """Nodes with rollout servers alone."""

    name: str | None = None
    """Name of the job; None is the name of the run folder."""

    resume: bool = False
    """Continue the run of the folder."""

    init: Path | None = None
    """Model to begin with, a Hugging Face folder or a checkpoint; None is ``model.path``."""

    dry_run: bool = False
    """Print the batch script and submit nothing."""

    detach: bool = False
    """Return as soon as the job is submitted."""


def launch(config_file: Path, settings: Sequence[str], site_name: str, how: LaunchOptions) -> int:
    """Submit a run, follow it, and return its exit code; 0 at once for a dry run or detached.

    Args:
        config_file: the run's config.
        settings: ``dotted.key=value`` on top of it.
        site_name: name or path of a site profile.
        how: everything else.

    Raises:
        ConfigError: if config, site, or both together have a fault; nothing is submitted then.
        ValueError: if ``how.init`` is no model, or ``RUN/model`` was made of another.
        SaveError: if ``RUN/model`` cannot be written.
        SlurmError: if the submission fails.
    """
    site, config = read_run(config_file, settings, site_name)
    config = begin_with_init(config, settings, how)
    with all_or_none() as jobs:
        folder = prepare_run(config, site, how)
        jobs.append(folder)
        provide_init(config, how)
    submit(site, jobs)
    if how.dry_run:
        logger.info("dry run: nothing is submitted; sbatch --requeue %s would", folder.script)
        sys.stdout.write(folder.script.read_text() + "\n")
        return 0
    if how.detach:
        return 0
    job_id = folder.job_id
    assert job_id is not None, "it was submitted"
    try:
        return follow(folder, job_id)
    except KeyboardInterrupt:
        logger.warning(
            "job %s goes on; prefixrl jobs logs %s --follow --site %s shows it again, prefixrl "
            "jobs cancel %s --site %s ends it",
            *(job_id, job_id, site_name, job_id, site_name),
        )
        return 130


def read_run(
    config_file: Path, settings: Sequence[str], site_name: str
) -> tuple[SiteConfig, RunConfig]:
    """Return a site, and a config with settings on top.

    Raises:
        ConfigError: if one has a fault.
    """
    site = load_site(site_name)
    values = with_settings(read_config_file(config_file), settings)
    return site, validate(RunConfig, values, where=str(config_file))


def begin_with_init(config: RunConfig, settings: Sequence[str], how: LaunchOptions) -> RunConfig:
    """Return the config of a run that begins with the model of ``--init``, if there is one.

    Args:
        config: as loaded.
        settings: all ``key=value`` that were given, a sweep's too.
        how: with ``init``.

    Raises:
        ConfigError: if ``settings`` name another model.
        ValueError: if ``init`` is no model.
    """
    if how.init is None:
        return config
    if any(setting.startswith("model.path=") for setting in settings):
        raise ConfigError("--init and model.path say the same thing; give one of them")
    # Here: it imports torch, which no other launch needs.
    from prefixrl_mcore.trainer.initial_model import with_initial_model, with_shape_of

    with_shape_of(config, how.init)  # an error if it is not there
    return with_initial_model(config, how.init)


def provide_init(config: RunConfig, how: LaunchOptions) -> None:
    """Make ``RUN/model`` of a checkpoint that ``--init`` names, once all else is checked.

    Here and not in the job: rollout servers start when the trainer does, and a start after a
    requeue finds it. A dry run makes none.

    Args:
        config: of ``begin_with_init``.
        how: with ``init``.

    Raises:
        ConfigError: if the run folder holds another run.
        ValueError: if ``RUN/model`` was made of another checkpoint.
        SaveError: if it cannot be written.
    """
    if how.init is None:
        return
    from prefixrl_mcore.trainer.initial_model import take_initial_model

    if how.dry_run:
        if not config.model.path.exists():
            logger.info("dry run: %s is not made of --init %s", config.model.path, how.init)
        return
    take_initial_model(config, how.init)
    logger.info("begins with the model %s (--init %s)", config.model.path, how.init)


@contextmanager
def all_or_none() -> Iterator[list[JobFolder]]:
    """Give the list of prepared jobs; where one is refused, the folders of the others go."""
    jobs: list[JobFolder] = []
    try:
        yield jobs
    except BaseException:
        for folder in jobs:
            shutil.rmtree(folder.path)
        raise


def prepare_run(
    config: RunConfig,
    site: SiteConfig,
    how: LaunchOptions,
    *,
    stage: str = TRAINER,
    after: JobFolder | None = None,
) -> JobFolder:
    """Check one job and write its folder, for ``submit``.

    Args:
        config: the run.
        site: where.
        how: everything else.
        stage: of the recipe; all but training take one task on one node.
        after: the job that must have completed before.

    Raises:
        ConfigError: if config and site do not fit.
    """
    name = how.name or config.run_folder.name
    if stage == TRAINER:
        layout = lay_out(
            config, site, shape=how.shape, nodes=how.nodes, rollout_nodes=how.rollout_nodes
        )
        _check_servers(config, layout)
        _warn_of_idle_gpus(config, site, layout)
        _check_model(config, how)
        _check_run_folder(config, resume=how.resume)
        logger.info("%s: %s", name, explain(config, site, layout))
    else:
        layout, config = ONE_TASK, _fill_node(config, site)
    _check_inputs(config, stage=stage, is_first=after is None, dry_run=how.dry_run)
    has_servers = RECIPE[stage] and layout.shape != "heterogeneous"
    needed = needed_paths(config, site, Path.cwd(), has_servers=has_servers)
    check_mounts(site, needed)
    warn_of_interpreters(site, needed)
    folder = JobFolder.make(site.job_folder, name)
    folder.config.write_text(dump_json(config), encoding="utf-8")
    task = TaskFile(
        config=str(folder.config),
        run_folder=str(config.run_folder),
        working_directory=str(Path.cwd()),
        is_resumed=how.resume,
        num_servers=layout.num_servers,
        gpus_per_server=(
            config.rollout.sglang.tensor_parallel_size if layout.rollout_gpus_per_node else 0
        ),
        shares_nodes=layout.shares_nodes,
    )
    submission = describe(
        name,
        site,
        layout,
        folder,
        dry_run=how.dry_run,
        role=stage,
        after=after,
        needed=paths_on_nodes(needed),
    )
    folder.write(task, submission)
    return folder


def _check_servers(config: RunConfig, layout: JobLayout) -> None:
    """Refuse rollout nodes that the run's engine would not use.

    Raises:
        ConfigError: naming the setting.
    """
    if not layout.rollout_nodes:
        return
    rollout = config.rollout
    faults = {
        "rollout.engine = 'transformers'": rollout.engine == "transformers",
        "rollout.sglang.urls": bool(rollout.sglang.urls),
        f"rollout.sglang.num_servers = {rollout.sglang.num_servers}": (
            rollout.sglang.num_servers > 1
        ),
        "rollout.colocated = true": rollout.colocated,
    }
    named = " and ".join(name for name, is_there in faults.items() if is_there)
    if named:
        raise ConfigError(
            f"--shape {layout.shape} starts SGLang servers on nodes of their own, as many as "
            f"--rollout-nodes have room for; leave out {named}"
        )


def _fill_node(config: RunConfig, site: SiteConfig) -> RunConfig:
    """Return a config with as many servers as a node takes where nothing is trained.

    Raises:
        ConfigError: if it has too few GPUs for one.
    """
    gpus = site.gpus_per_node
    if not config.rollout.starts_servers or gpus == 0:
        return config
    num_servers = max(1, gpus // config.rollout.sglang.tensor_parallel_size)
    rollout = config.rollout.with_num_servers(num_servers)
    check_server_gpus(rollout, num_trainer_ranks=0, num_gpus=gpus)
    return config.model_copy(update={"rollout": rollout})


def _warn_of_idle_gpus(config: RunConfig, site: SiteConfig, layout: JobLayout) -> None:
    """Say what a forgotten ``rollout.sglang.num_servers`` comes to on one node."""
    rollout = config.rollout
    has_own_servers = rollout.starts_servers and not layout.server_nodes
    if not has_own_servers or not site.gpus_per_node or not rollout.colocated:
        return
    num_gpus = layout.trainer_nodes * layout.ranks_per_node
    num_sampling = rollout.sglang.num_servers * rollout.sglang.tensor_parallel_size
    if num_sampling < num_gpus:
        logger.warning(
            "%d of %d GPUs sample: rollout.sglang.num_servers = %d x TP %d",
            *(num_sampling, num_gpus, rollout.sglang.num_servers),
            rollout.sglang.tensor_parallel_size,
        )


def _check_inputs(config: RunConfig, *, stage: str, is_first: bool, dry_run: bool) -> None:
    """Refuse a job whose data is not there, which would wait for nodes to fail on them.

    Args:
        config: the run.
        stage: of the recipe.
        is_first: no job before it makes some of it.
        dry_run: warn only.

    Raises:
        ConfigError: naming what is missing.
    """
    made_before = {config.traces_folder, config.prefixes_folder}
    if stage == TRAINER and is_first:
        made_before = set()
    missing = [
        str(path) for path in input_paths(config) if path not in made_before and not path.exists()
    ]
    if not missing:
        return
    text = f"not there: {', '.join(missing)}"
    if any(Path(path) in (config.traces_folder, config.prefixes_folder) for path in missing):
        text += (
            "; traces and prefixes are made by prefixrl collect and prefixes, by --recipe, or are "
            "those of another run: data.traces=FOLDER data.prefixes=FOLDER"
        )
    if not dry_run:
        raise ConfigError(text)
    logger.warning("%s", text)


def _check_model(config: RunConfig, how: LaunchOptions) -> None:
    """Refuse a layout that training would refuse; a dry run does without the model.

    Raises:
        ConfigError: naming what does not fit.
    """
    if how.init is not None and not config.model.path.exists():  # it is yet to be made
        from prefixrl_mcore.trainer.initial_model import with_shape_of

        config = with_shape_of(config, how.init)
    if how.dry_run and not config.model.path.exists():
        logger.warning("model.path %s is not here: the layout is not checked", config.model.path)
        return
    check_layout(config, read_shape(config))


def _check_run_folder(config: RunConfig, *, resume: bool) -> None:
    """Refuse what training would refuse at its start, before the job waits for nodes.

    Raises:
        ConfigError: if the folder holds a run and is not to be resumed, or none and is.
    """
    folder = RunFolder(config.run_folder)
    folder.check(config)
    if resume and not folder.config_file.exists():
        raise ConfigError(f"run_folder {config.run_folder}: holds no run to resume")
    if not resume and folder.metrics_file.exists():
        raise ConfigError(
            f"run_folder {config.run_folder}: holds a training run already; continue it with "
            "--resume, or choose another with run_folder=..."
        )
