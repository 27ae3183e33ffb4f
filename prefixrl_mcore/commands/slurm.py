"""``prefixrl launch`` and ``prefixrl jobs``: runs on a Slurm cluster."""

import argparse
from pathlib import Path

_JOBS = Path("runs/jobs")


def add_launch_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``launch CONFIG --site SITE [key=value ...]``."""
    launch = commands.add_parser(
        "launch",
        help="train on a Slurm cluster: check, submit, follow, exit with the job's exit code",
        description="Check a config against a site, submit it to Slurm through NeMo-Run, show its "
        "state and log until it ends, requeues included. Exit code 0 only if the job completed.",
        epilog="Settings follow as key=value, for example trainer.num_steps=100. See "
        "slurm/README.md.",
        usage="prefixrl launch CONFIG --site SITE [options] [key=value ...]",
    )
    launch.add_argument("config", type=Path, metavar="CONFIG", help="TOML file, see configs/")
    launch.add_argument(
        "--site", required=True, metavar="SITE", help="site profile: a name or a .toml file"
    )
    launch.add_argument(
        "--shape",
        choices=("colocated", "split", "heterogeneous"),
        default="colocated",
        help="rollouts on the trainer's nodes (default), on others of the same job, or on "
        "others of a heterogeneous job",
    )
    launch.add_argument(
        "--nodes", type=int, metavar="N", help="fail unless the run needs exactly N nodes"
    )
    launch.add_argument(
        "--rollout-nodes",
        type=int,
        metavar="N",
        help="nodes with rollout servers alone, of --shape split or heterogeneous (default: 1)",
    )
    launch.add_argument("--name", help="of the job (default: the run folder's)")
    launch.add_argument("--resume", action="store_true", help="continue the run in run_folder")
    launch.add_argument(
        "--init",
        type=Path,
        metavar="FOLDER",
        help="begin with this model in place of the config's model.path: a Hugging Face folder, or "
        "a checkpoint (of a run, the latest), of which RUN/model is made here before anything is "
        "submitted; again with --resume",
    )
    launch.add_argument(
        "--dry-run", action="store_true", help="print the batch script, submit nothing"
    )
    launch.add_argument(
        "--recipe",
        action="store_true",
        help="all stages, each a job after the one before: collect, prefixes, train, eval, report",
    )
    launch.add_argument(
        "--sweep",
        action="append",
        metavar="KEY=V,V",
        help="one run per value, with a run folder of its own; several --sweep are combined",
    )
    launch.add_argument("--detach", action="store_true", help="do not wait for the job")
    launch.set_defaults(run=_launch)


def add_jobs_commands(jobs: argparse.ArgumentParser) -> None:
    """Add ``jobs list | status | logs | cancel``."""
    actions = jobs.add_subparsers(title="actions", required=True, metavar="ACTION")
    for name, run, text in (
        ("list", _list, "one line per job"),
        ("status", _status, "state of a job; of a failed one why; exit code as launch"),
        ("logs", _logs, "log of a task of a job"),
        ("cancel", _cancel, "end a job"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument(
            "--jobs", type=Path, metavar="FOLDER", help=f"where jobs lie (default: {_JOBS})"
        )
        action.add_argument("--site", metavar="SITE", help="take its job_folder for --jobs")
        action.set_defaults(run=run)
        if name != "list":
            action.add_argument("job", help="Slurm's number, or the beginning of its folder's name")
        if name == "logs":
            action.add_argument(
                "--task", help="trainer-3, rollout-0, ... batch (default: the job's first task)"
            )
            action.add_argument(
                "--start", type=int, help="which start (default: the last; with --follow all)"
            )
            action.add_argument(
                "--follow", action="store_true", help="print what is written until the job ends"
            )


def _launch(arguments: argparse.Namespace, rest: list[str]) -> int:
    from prefixrl_mcore.launch.slurm.launch import LaunchOptions, launch
    from prefixrl_mcore.launch.slurm.recipe import launch_recipe, launch_sweep

    how = LaunchOptions(
        shape=arguments.shape,
        nodes=arguments.nodes,
        rollout_nodes=arguments.rollout_nodes,
        name=arguments.name,
        resume=arguments.resume,
        init=arguments.init,
        dry_run=arguments.dry_run,
        detach=arguments.detach,
    )
    what = (arguments.config, rest, arguments.site, how)
    if arguments.recipe and arguments.sweep:
        raise ValueError(
            "--recipe and --sweep: sweep over the training of collected data; give one"
        )
    if arguments.recipe:
        return launch_recipe(*what)
    return launch_sweep(*what, arguments.sweep) if arguments.sweep else launch(*what)


def _list(arguments: argparse.Namespace, _rest: list[str]) -> int:
    from prefixrl_mcore.launch.slurm.jobs import list_jobs

    list_jobs(_jobs_folder(arguments))
    return 0


def _status(arguments: argparse.Namespace, _rest: list[str]) -> int:
    from prefixrl_mcore.launch.slurm.jobs import show_status

    return show_status(_jobs_folder(arguments), arguments.job)


def _logs(arguments: argparse.Namespace, _rest: list[str]) -> int:
    from prefixrl_mcore.launch.slurm.jobs import show_logs

    return show_logs(
        _jobs_folder(arguments),
        arguments.job,
        task=arguments.task,
        start=arguments.start,
        is_followed=arguments.follow,
    )


def _cancel(arguments: argparse.Namespace, _rest: list[str]) -> int:
    from prefixrl_mcore.launch.slurm.jobs import cancel

    cancel(_jobs_folder(arguments), arguments.job)
    return 0


def _jobs_folder(arguments: argparse.Namespace) -> Path:
    """Return where to look for jobs; ``--jobs`` comes before ``--site``."""
    from prefixrl_mcore.launch.slurm.sites import load_site

    if arguments.jobs is not None:
        return arguments.jobs
    return load_site(arguments.site).job_folder if arguments.site else _JOBS
