"""``prefixrl convert`` and ``checkpoint``: what works on a model's files, without a config."""

import argparse
from collections.abc import Sequence
from pathlib import Path

_LAYOUT_FLAGS = ("--tp", "--pp", "--vpp", "--cp", "--ep", "--etp")
"""What other converters ask for."""


def add_convert_commands(convert: argparse.ArgumentParser) -> None:
    """Add ``convert to-hf | from-hf | verify``."""
    actions = convert.add_subparsers(title="actions", required=True, metavar="ACTION")
    to_hf = actions.add_parser(
        "to-hf",
        help="checkpoint -> Hugging Face folder",
        description="Write a checkpoint's weights as a Hugging Face folder, without a model, a "
        "GPU or other ranks. Repeated after a kill, it goes on from the finished files.",
    )
    to_hf.add_argument("checkpoint", type=Path, help="checkpoint folder (…/step-000040)")
    to_hf.add_argument("out", type=Path, help="folder to be made")
    to_hf.set_defaults(run=_convert_to_hf)
    from_hf = actions.add_parser(
        "from-hf",
        help="Hugging Face folder -> checkpoint",
        description="Write a Hugging Face folder's weights as a checkpoint that loads in any "
        "parallel layout. Repeated after a kill, it goes on from the finished files.",
    )
    from_hf.add_argument("model", type=Path, help="Hugging Face folder")
    from_hf.add_argument("out", type=Path, help="checkpoint folder to be made")
    from_hf.set_defaults(run=_convert_from_hf)
    for command in (to_hf, from_hf):
        command.add_argument("--dtype", choices=("bf16", "fp32"), help="default: as it is")
        command.add_argument(
            "--shard-size",
            default="5GB",
            metavar="SIZE",
            help="begin a new weight file above this (default 5GB); a kill costs at most one file",
        )
        command.add_argument(
            *_LAYOUT_FLAGS, action=_RefusedLayout, nargs="?", help=argparse.SUPPRESS
        )
    verify = actions.add_parser(
        "verify",
        help="compare two models tensor by tensor; exit code 1 if they differ",
        description="Compare two models, each a Hugging Face folder, a checkpoint, or a run "
        "(its latest): names, shapes, types and checksums of all weights, and what the configs say "
        "of the computation. "
        "Exit code 0 if they are the same, bit for bit, 1 if they differ, 2 on bad input.",
    )
    verify.add_argument("first", type=Path, help="Hugging Face folder, checkpoint or run")
    verify.add_argument("second", type=Path, help="Hugging Face folder, checkpoint or run")
    verify.add_argument(
        "--forward",
        action="store_true",
        help="run both with transformers too; needs memory for one of them",
    )
    verify.add_argument(
        "--prompts", type=Path, help="one prompt per line, for --forward, which it implies"
    )
    verify.set_defaults(run=_convert_verify)


class _RefusedLayout(argparse.Action):
    """A layout flag: ends the command with the reason why there is none."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        parser.error(
            f"there is no {option_string}: a checkpoint has no layout, it stores whole tensors and "
            "every layout reads them; repeat without it, and give the layout to training, in "
            "policy.parallel"
        )


def add_checkpoint_commands(checkpoint: argparse.ArgumentParser) -> None:
    """Add ``checkpoint ls | show | verify``; none of them needs torch."""
    actions = checkpoint.add_subparsers(title="actions", required=True, metavar="ACTION")
    for name, run, text in (
        ("ls", _checkpoint_ls, "one line per checkpoint: size, layout, age, complete or why not"),
        ("show", _checkpoint_show, "a checkpoint's step, layout, settings and files"),
        ("verify", _checkpoint_verify, "compare every file with its checksum; exit code 1 if bad"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("path", type=Path, help="run folder, its checkpoints, or one of them")
        action.set_defaults(run=run)


# Each command imports what it needs: `--help` answers without torch.


def _convert_to_hf(arguments: argparse.Namespace, _rest: list[str]) -> int:
    from prefixrl_mcore.trainer.convert_commands import run_to_hf

    run_to_hf(
        arguments.checkpoint,
        arguments.out,
        dtype=arguments.dtype,
        file_size=arguments.shard_size,
    )
    return 0


def _convert_from_hf(arguments: argparse.Namespace, _rest: list[str]) -> int:
    from prefixrl_mcore.trainer.convert_commands import run_from_hf

    run_from_hf(
        arguments.model, arguments.out, dtype=arguments.dtype, file_size=arguments.shard_size
    )
    return 0


def _convert_verify(arguments: argparse.Namespace, _rest: list[str]) -> int:
    from prefixrl_mcore.trainer.verify_models import run_verify

    with_forward = arguments.forward or arguments.prompts is not None
    are_equal = run_verify(
        arguments.first, arguments.second, with_forward=with_forward, prompts=arguments.prompts
    )
    return 0 if are_equal else 1


def _checkpoint_ls(arguments: argparse.Namespace, _rest: list[str]) -> int:
    from prefixrl_mcore.trainer.checkpoint_commands import list_checkpoints

    list_checkpoints(arguments.path)
    return 0


def _checkpoint_show(arguments: argparse.Namespace, _rest: list[str]) -> int:
    from prefixrl_mcore.trainer.checkpoint_commands import show_checkpoint

    show_checkpoint(arguments.path)
    return 0


def _checkpoint_verify(arguments: argparse.Namespace, _rest: list[str]) -> int:
    from prefixrl_mcore.trainer.checkpoint_commands import verify_checkpoints

    return 0 if verify_checkpoints(arguments.path) else 1
