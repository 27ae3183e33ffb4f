"""``prefixrl doctor``: what is installed and usable, with the remedy for what is not."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.launch.doctor import Finding, examine, make_sglang_environment


def add_doctor_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add ``doctor [--fix]``."""
    doctor = commands.add_parser(
        "doctor",
        help="what is installed and usable here; --fix makes SGLang's environment",
        description="Look at Python, packages, GPUs, SGLang's environment, shared memory and disk. "
        "Exit code 0 if all that is needed is there, 1 if not.",
    )
    doctor.add_argument(
        "--fix", action="store_true", help="make or complete SGLang's environment with uv"
    )
    doctor.add_argument(
        "--sglang-python",
        type=Path,
        default=SGLangConfig().python,
        metavar="PATH",
        help="interpreter of SGLang's environment (default: %(default)s)",
    )
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace, _rest: list[str]) -> int:
    console = Console()
    if arguments.fix:
        console.print(f"making {arguments.sglang_python.parent.parent} ...", highlight=False)
        if make_sglang_environment(arguments.sglang_python) != 0:
            console.print("SGLang's environment could not be made; see above", style="red")
            return 1
    findings = examine(arguments.sglang_python, Path.cwd())
    console.print(_table(findings))
    missing = [finding for finding in findings if not finding.is_ok]
    console.print(f"{len(missing)} missing" if missing else "all there", highlight=False)
    return 1 if missing else 0


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        verdict = "[green]ok[/]" if finding.is_ok else "[red]missing[/]"
        remedy = f"\n-> {finding.remedy}" if finding.remedy else ""
        table.add_row(verdict, finding.subject, Text(f"{finding.detail}{remedy}"))
    return table
