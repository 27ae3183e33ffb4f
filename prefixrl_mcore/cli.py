"""The console script ``prefixrl``: parse and dispatch, nothing else.

Exit codes: 0 done; 2 bad input or config, nothing was overwritten; 1 anything that failed
underway; 128 + n stopped by signal n after saving; 75 stopped before a wall-clock limit after
saving (start again with --resume); 76 stopped because a rank made no progress, not saved.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from prefixrl_mcore.checkpoint.manifest import SaveError
from prefixrl_mcore.commands.doctor import add_doctor_command
from prefixrl_mcore.commands.model_files import add_checkpoint_commands, add_convert_commands
from prefixrl_mcore.commands.slurm import add_jobs_commands, add_launch_command
from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.load import load_config, print_settings
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.launch.slurm.states import SlurmError
from prefixrl_mcore.observability.metrics import check_packages
from prefixrl_mcore.rewards.build import find_verifier
from prefixrl_mcore.rollout.sglang.api_key import find_api_key

logger = logging.getLogger(__name__)

_LOG_WIDTH = 200
"""Columns of log lines that go to a file."""

_SETTINGS_HELP = (
    "Any setting of the config can be given as a flag, for example "
    "--policy.optimizer.lr 1e-5 or --run-folder runs/second; --help-settings lists them all, with "
    "the values of CONFIG, or without CONFIG with the program's defaults."
)


_OVERLAP_FLAGS = (
    *("--rollout.schedule.overlap", "--rollout.schedule.max-staleness", "1"),
    *("--loss.importance", "truncated"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code."""
    arguments, rest = _parser().parse_known_args(argv)
    arguments.argv = list(argv) if argv is not None else sys.argv[1:]
    _set_up_logging(verbose=arguments.verbose)
    if rest and not hasattr(arguments, "config"):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return arguments.run(arguments, rest)
    except ValueError as error:  # bad input: configs, data, checkpoints that do not fit
        _print_error(error)
        logger.debug("raised here (shown by --verbose)", exc_info=True)
        return exit_codes.BAD_INPUT
    except (SaveError, SlurmError) as error:  # the message says what to do
        _print_error(error)
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; start it again to continue (train with --resume)")
        return 130


def _print_error(error: Exception) -> None:
    """Print an error that says by itself what to do, in one line."""
    Console(stderr=True).print(
        f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True
    )


def _parser() -> argparse.ArgumentParser:
    """Build the parser of all sub-commands."""
    parser = argparse.ArgumentParser(
        prog="prefixrl",
        description="Train language models on hard problems with PrefixRL (arXiv 2601.18795).",
        epilog="The usual order: collect, prefixes, train, eval, report. Try: prefixrl demo",
    )
    parser.add_argument("--verbose", action="store_true", help="log debug messages too")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_pipeline_commands(commands)
    _add_tool_commands(commands)
    return parser


def _add_pipeline_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the stages of a run; each takes CONFIG and any setting as a flag."""
    collect = _add_config_command(
        commands,
        "collect",
        _collect,
        "Sample the base policy until each problem has one verified trace, or a cap is reached.",
        "Writes the trace store (Parquet). A killed collection continues where it stopped. All "
        "sampling, failed tries included, is charged to the run in FLOPs.",
    )
    prefixes = _add_config_command(
        commands,
        "prefixes",
        _prefixes,
        "Cut prefixes from the collected traces, at random token positions, once for the run.",
        "Token ids are cut, never re-tokenised. Prefixes that already state the final answer are "
        "flagged. A store of another tokenizer or chat template is refused.",
    )
    train = _add_config_command(
        commands,
        "train",
        _train,
        "Train: sync weights, sample groups, verify, one Megatron step.",
        "With --method rl or sft_then_rl the same program runs a baseline. With more than one "
        "rank in policy.parallel the ranks are started here, or by torchrun.",
    )
    train.add_argument(
        "--resume",
        action="store_true",
        help="continue exactly from the last complete checkpoint of the run folder",
    )
    train.add_argument(
        "--profile",
        type=int,
        nargs="+",
        metavar="STEP",
        help="write torch.profiler traces of these steps to profile/ in the run folder: short for "
        "--profile.steps; see also --profile.ranks, --profile.with-stacks, "
        "--profile.memory-snapshot",
    )
    train.add_argument(
        "--overlap",
        action="store_true",
        help="sample the next step's rollouts during the update: short for "
        f"{' '.join(_OVERLAP_FLAGS)}",
    )
    again = _add_config_command(
        commands,
        "replay",
        _replay,
        "Run the update again whose loss or gradient was not finite, from the run's dump.",
        "Needs neither engine nor data; another layout may be given by flags. Exit code 0 if the "
        "update is non-finite again, 3 if it was finite this time.",
    )
    again.add_argument("--step", type=int, required=True, help="step that the error names")
    again.add_argument(
        "--sft", action="store_true", help="of the supervised phase, whose dumps are in dumps/sft"
    )
    evaluate = _add_config_command(
        commands,
        "eval",
        _eval,
        "Evaluate a checkpoint: unbiased pass@k, accuracy by prefix bin, unlock curve.",
        "Results are written to eval/ in the run folder as JSON and shown as tables.",
    )
    evaluate.add_argument(
        "--checkpoint",
        default="latest",
        metavar="WHICH",
        help="'latest' (default), 'base' (the initial weights), a step number, or a path",
    )
    check = _add_config_command(
        commands,
        "check",
        _check,
        "Print what would run: layout, FLOPs, predicted memory and step time; starts nothing.",
        "Reads the config and the model's config.json; touches no GPU. Says whether it fits, what "
        "to change if not, and with --suggest or another number of --gpus the best layouts.",
    )
    _add_machine_options(check)
    for command in (collect, prefixes, train, evaluate, check):
        _add_init(command)


def _add_init(command: argparse.ArgumentParser) -> None:
    """Add the choice of the run's initial model."""
    command.add_argument(
        "--init",
        type=Path,
        metavar="FOLDER",
        help="begin with this model in place of the config's model.path: a Hugging Face folder, or "
        "a checkpoint (of a run, the latest), of which RUN/model is made first; give it to every "
        "command of the run, and again with --resume",
    )


def _add_machine_options(check: argparse.ArgumentParser) -> None:
    """Add what ``check`` takes for granted of the machine."""
    check.add_argument("--gpus", type=int, metavar="N", help="trainer GPUs (default: the config's)")
    check.add_argument(
        "--rollout-gpus",
        type=int,
        metavar="N",
        help="GPUs of nodes that only sample (default: as the config says: after the trainer's on "
        "its node, or with rollout.colocated the same ones)",
    )
    check.add_argument(
        "--gpu-memory",
        type=float,
        default=80.0,
        metavar="GIB",
        help="memory of one GPU, GiB (default: 80)",
    )
    check.add_argument(
        "--reserved",
        type=float,
        default=0.1,
        metavar="FRACTION",
        help="share of a GPU's memory kept free for CUDA, NCCL and fragmentation (default: 0.1)",
    )
    check.add_argument("--suggest", action="store_true", help="search all layouts of the GPUs")
    check.add_argument(
        "--gpu",
        default="H100",
        metavar="NAME",
        help="GPU model, for its peak FLOPs and its memory's bandwidth (default: H100)",
    )
    check.add_argument(
        "--update-efficiency",
        type=float,
        default=0.4,
        metavar="FRACTION",
        help="share of the peak FLOPs that the update reaches (default: 0.4)",
    )
    check.add_argument(
        "--rollout-efficiency",
        type=float,
        default=0.1,
        metavar="FRACTION",
        help="share of the peak FLOPs that sampling reaches (default: 0.1)",
    )
    check.add_argument(
        "--mean-tokens",
        type=float,
        metavar="S",
        help="mean length of a sequence, tokens (default: rollout.max_total_tokens, the most)",
    )


def _add_tool_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands that work on files instead of a config."""
    traces = commands.add_parser("traces", help="import, show and check traces of a trace store")
    _add_traces_commands(traces)
    add_convert_commands(
        commands.add_parser(
            "convert", help="convert between checkpoints and Hugging Face folders, and compare them"
        )
    )
    add_checkpoint_commands(
        commands.add_parser("checkpoint", help="list, show and verify the checkpoints of a run")
    )

    add_launch_command(commands)
    add_jobs_commands(
        commands.add_parser("jobs", help="list, show and cancel what launch has submitted")
    )

    add_doctor_command(commands)
    summary = "One HTML page that compares one or more runs."
    report = commands.add_parser(
        "report",
        help=summary,
        description=f"{summary} It has results, accuracy against FLOPs, what prefixes do, training "
        "curves, where the time goes, and rollouts to read; it needs no network.",
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    report.add_argument("--out", type=Path, help="default: report.html in the first run folder")
    report.set_defaults(run=_report)

    demo = commands.add_parser(
        "demo",
        help="the whole of PrefixRL on this machine's CPU, at micro scale, with a report",
        description="Makes a base policy and a synthetic, verifiable reasoning task, then runs "
        "collect, prefixes, train (PrefixRL and the baselines on one FLOPs budget), eval, "
        "convert and report. Can be started again after an interruption.",
    )
    demo.add_argument("--folder", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    demo.add_argument(
        "--configs",
        type=Path,
        default=Path("configs/demo"),
        metavar="FOLDER",
        help="folder with task.toml and run.toml (default: configs/demo)",
    )
    demo.add_argument("--fresh", action="store_true", help="delete the folder's results first")
    demo.add_argument("--engine", choices=("sglang", "transformers"), help="rollout engine")
    demo.set_defaults(run=_demo)


def _add_traces_commands(traces: argparse.ArgumentParser) -> None:
    """Add ``traces import | show | stats | verify``."""
    actions = traces.add_subparsers(title="actions", required=True, metavar="ACTION")
    importing = _add_config_command(
        actions,
        "import",
        _traces_import,
        "Import traces made elsewhere (text or token ids, any model family), each verified.",
        "Rejected traces are listed with the reason; nothing is dropped silently.",
    )
    importing.add_argument(
        "--file",
        type=Path,
        required=True,
        help="one JSON object per line and trace: problem_id (or problem, its exact text), and "
        "text (what follows the prompt) or token_ids; optional finish_reason, is_correct, "
        "source_model, rollout_logprobs, temperature, seed, num_tries, flops, seconds, "
        "tokenizer_hash; other fields are counted and ignored",
    )
    importing.add_argument(
        "--format",
        choices=("jsonl", "gsm8k_solutions"),
        default="jsonl",
        help="jsonl (default), or the file of model solutions that is published with GSM8K",
    )
    importing.add_argument("--source", required=True, help="name of the model that made them")
    importing.add_argument(
        "--keep", choices=("first", "all"), default="first", help="verified traces per problem"
    )
    _add_config_command(
        actions,
        "verify",
        _traces_verify,
        "Verify every stored trace again with the config's verifier.",
        "Exit code 1 if a stored trace does not verify.",
    )
    for name, run, text in (
        ("show", _traces_show, "show traces as text"),
        ("stats", _traces_stats, "solved problems, tries, tokens, FLOPs"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("store", type=Path, help="folder of the trace store")
        action.set_defaults(run=run)
        if name == "show":
            action.add_argument("--problem", help="only this problem id")
            action.add_argument("--model", type=Path, help="folder of the tokenizer, if moved")
            action.add_argument("--limit", type=int, default=5, help="traces shown (default 5)")


def _add_config_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace, list[str]], int],
    summary: str,
    details: str,
) -> argparse.ArgumentParser:
    """Add a command that takes CONFIG and settings as flags."""
    command = commands.add_parser(
        name, help=summary, description=f"{summary} {details}", epilog=_SETTINGS_HELP
    )
    command.add_argument("config", type=Path, metavar="CONFIG", help="TOML file, see configs/")
    command.add_argument(
        "--help-settings",
        action=_HelpSettings,
        nargs="?",
        type=Path,
        metavar="CONFIG",
        help="list all settings and the values of CONFIG, or without one the program's defaults",
    )
    command.set_defaults(run=run, prog=command.prog)
    return command


class _HelpSettings(argparse.Action):
    """``--help-settings``: ends the command like ``--help``, wherever CONFIG stands, or without."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        path = values if isinstance(values, Path) else namespace.config
        try:
            print_settings(RunConfig, path, prog=f"{parser.prog} {path or 'CONFIG'}")
        except ConfigError as error:
            parser.error(str(error))
        parser.exit()


def _set_up_logging(*, verbose: bool) -> None:
    """Log to stderr on rank 0; the other ranks log warnings only."""
    is_first = os.environ.get("RANK", "0") == "0"
    level = (logging.DEBUG if verbose else logging.INFO) if is_first else logging.WARNING
    if not verbose:  # what the libraries warn of here is known and handled
        for category in (UserWarning, DeprecationWarning, FutureWarning, SyntaxWarning):
            warnings.filterwarnings("ignore", category=category)
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA runtime
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=_LOG_WIDTH)
    handler = RichHandler(console=console, show_path=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    # The last is __main__ when started by python -m.
    for name in ("prefixrl_mcore", "prefixrl_kernels", __name__):
        logging.getLogger(name).setLevel(level)


def _escape(text: str) -> str:
    """Return ``text`` so that rich prints square brackets as they are."""
    return text.replace("[", "\\[")


def _load(arguments: argparse.Namespace, rest: list[str]) -> RunConfig:
    """Read CONFIG with the flags on top."""
    if getattr(arguments, "init", None) and any(f.startswith("--model.path") for f in rest):
        raise ValueError("--init and --model.path say the same thing; give one of them")
    if arguments.config.suffix not in (".toml", ".json") and not arguments.config.exists():
        raise ValueError(
            f"CONFIG {arguments.config}: does not exist and is no TOML file; CONFIG comes first, "
            "flags after it"
        )
    prog = f"{arguments.prog} {arguments.config}"
    config = load_config(RunConfig, arguments.config, rest, prog=prog)
    find_verifier(config.reward)
    if config.rollout.engine != "transformers":
        find_api_key(config.rollout.sglang)  # a missing one is refused before anything is started
    return config


def _load_with_model(arguments: argparse.Namespace, rest: list[str]) -> RunConfig:
    """Read CONFIG with the flags and ``--init`` on top; ``RUN/model`` is made if it is needed."""
    config = _load(arguments, rest)
    if arguments.init is None:
        return config
    from prefixrl_mcore.trainer.initial_model import take_initial_model

    return take_initial_model(config, arguments.init)


# Each command imports what it needs: `prefixrl check` and `--help` answer without torch.


def _collect(arguments: argparse.Namespace, rest: list[str]) -> int:
    from prefixrl_mcore.trainer.collect import collect

    collect(_load_with_model(arguments, rest))
    return 0


def _prefixes(arguments: argparse.Namespace, rest: list[str]) -> int:
    from prefixrl_mcore.trainer.cut import cut

    cut(_load_with_model(arguments, rest))
    return 0


def _train(arguments: argparse.Namespace, rest: list[str]) -> int:
    if arguments.profile:
        rest = [*rest, "--profile.steps", *map(str, arguments.profile)]
    if arguments.overlap:
        rest = [*_OVERLAP_FLAGS, *rest]
    config = _load(arguments, rest)
    check_packages(config.metrics)
    if _needs_ranks(config):
        return _start_ranks(config, arguments.argv)
    _ask_for_equal_bits()
    from prefixrl_mcore.launch.check import predict_rank_bytes
    from prefixrl_mcore.trainer.initial_model import with_shape_of
    from prefixrl_mcore.trainer.run import run_training

    initial = with_shape_of(config, arguments.init)
    return run_training(
        config,
        resume=arguments.resume,
        predicted_bytes=predict_rank_bytes(initial),
        init=arguments.init,
    )


def _replay(arguments: argparse.Namespace, rest: list[str]) -> int:
    config = _load(arguments, rest)
    if _needs_ranks(config):
        return _start_ranks(config, arguments.argv)
    _ask_for_equal_bits()
    from prefixrl_mcore.trainer.replay import run_replay

    return run_replay(config, arguments.step, is_sft=arguments.sft)


def _needs_ranks(config: RunConfig) -> bool:
    """Return whether several ranks are wanted and nobody has started them."""
    return config.policy.parallel.world_size > 1 and "RANK" not in os.environ


def _ask_for_equal_bits() -> None:
    """Let this rank, whoever has started it, repeat a run bit for bit, unless the user says not."""
    from prefixrl_mcore.launch.local import EQUAL_BITS

    for name, value in EQUAL_BITS.items():
        os.environ.setdefault(name, value)


def _start_ranks(config: RunConfig, argv: list[str]) -> int:
    """Run this command once more on every rank."""
    from prefixrl_mcore.launch.local import launch_ranks
    from prefixrl_mcore.observability.run_folder import RunFolder

    return launch_ranks(
        config.policy.parallel.world_size, argv, log_folder=RunFolder(config.run_folder).logs
    )


def _eval(arguments: argparse.Namespace, rest: list[str]) -> int:
    from prefixrl_mcore.eval.command import evaluate_checkpoint

    evaluate_checkpoint(_load_with_model(arguments, rest), arguments.checkpoint)
    return 0


def _check(arguments: argparse.Namespace, rest: list[str]) -> int:
    from prefixrl_mcore.accounting.hardware import memory_bandwidth
    from prefixrl_mcore.accounting.step_time import Assumptions
    from prefixrl_mcore.launch.check import gpu_flops, print_check
    from prefixrl_mcore.launch.machine import Machine

    config = _load(arguments, rest)
    if arguments.init:
        from prefixrl_mcore.trainer.initial_model import with_shape_of

        config = with_shape_of(config, arguments.init)
    machine = Machine(
        num_gpus=arguments.gpus,
        memory_gib=arguments.gpu_memory,
        reserved_fraction=arguments.reserved,
        mean_tokens=arguments.mean_tokens,
        assumptions=Assumptions(
            peak_flops=gpu_flops(config, arguments.gpu),
            update_efficiency=arguments.update_efficiency,
            rollout_efficiency=arguments.rollout_efficiency,
        ),
        rollout_gpus=arguments.rollout_gpus,
        memory_bytes_per_second=memory_bandwidth(arguments.gpu),
    )
    print_check(config, machine, suggest=arguments.suggest)
    return 0


def _report(arguments: argparse.Namespace, _rest: list[str]) -> int:
    from prefixrl_mcore.report.html import build_report

    out = arguments.out or arguments.runs[0] / "report.html"
    Console().print(f"report: {build_report(arguments.runs, out)}", highlight=False)
    return 0


def _demo(arguments: argparse.Namespace, _rest: list[str]) -> int:
    from prefixrl_mcore.demo.run import run_demo

    return run_demo(
        arguments.folder,
        folder_of_configs=arguments.configs,
        fresh=arguments.fresh,
        engine=arguments.engine,
    )


def _traces_import(arguments: argparse.Namespace, rest: list[str]) -> int:
    from prefixrl_mcore.trainer.trace_commands import import_traces

    import_traces(
        _load(arguments, rest),
        file=arguments.file,
        file_format=arguments.format,
        source=arguments.source,
        keep=arguments.keep,
    )
    return 0


def _traces_verify(arguments: argparse.Namespace, rest: list[str]) -> int:
    from prefixrl_mcore.trainer.trace_commands import verify_traces

    return 0 if verify_traces(_load(arguments, rest)) else 1


def _traces_show(arguments: argparse.Namespace, _rest: list[str]) -> int:
    from prefixrl_mcore.trainer.trace_commands import show_traces

    show_traces(
        arguments.store, problem_id=arguments.problem, limit=arguments.limit, model=arguments.model
    )
    return 0


def _traces_stats(arguments: argparse.Namespace, _rest: list[str]) -> int:
    from prefixrl_mcore.trainer.trace_commands import show_stats

    show_stats(arguments.store)
    return 0


if __name__ == "__main__":
    sys.exit(main())
