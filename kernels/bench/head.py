"""``python -m bench.head``: the head against its peers, from the folder ``kernels``.

On a GPU it measures and writes a JSON file into ``bench/results``; ``python -m bench.report`` makes
tables and plot from all of them. A long sweep may be split over several calls, by shapes, tokens,
fractions, masks or peers: ours and the ceiling take part in each, so that every comparison is
between things measured in turns. Without a GPU it checks tiny sizes for correctness and writes
nothing.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from rich.console import Console

from bench.cases import FRACTIONS, MASKS, SHAPES, TOKENS, Case, quick_sweep, sweep, tiny_sweep
from bench.cell import Settings, measure_case
from bench.check import check_cases, errors_table
from bench.display import Display, cell_table
from bench.environment import Environment, describe, map_memory_in_growing_segments
from bench.gemms import CEILING, FLOAT32_LOGITS
from bench.implementation import Implementation
from bench.measure import CudaDevice, Device
from bench.ours import ours
from bench.peers import peers
from bench.records import CellRecord, RunRecord, write_record

RESULTS = Path(__file__).parent / "results"

_QUICK = Settings(repetitions=10, warmups=2, budget_seconds=0.5)


def all_implementations() -> list[Implementation]:
    """Return ceilings, ours and peers."""
    return [CEILING, FLOAT32_LOGITS, *ours(), *peers()]


def main(
    arguments: Sequence[str] | None = None,
    implementations: Sequence[Implementation] | None = None,
) -> int:
    """Measure or, without a GPU, check; return the exit status.

    Args:
        arguments: of the command line; None takes the process's.
        implementations: who takes part; None is everybody.

    Returns:
        1 if one of ours failed or is further from the truth than rounding explains (without a GPU
        that holds for peers too), else 0.
    """
    options = _parse(arguments)
    chosen = choose(implementations or all_implementations(), options.ours, options.peers)
    console = Console(stderr=True)
    if options.list:
        Console().print("\n".join(item.name for item in chosen))
        return 0
    if not torch.cuda.is_available():
        return check(chosen, options.seed, console)
    map_memory_in_growing_segments()
    device = CudaDevice()
    environment = describe(device.torch_device, options.commit)
    console.print(f"{environment.device}, driver {environment.driver}, torch {torch.__version__}")
    return measure(options, chosen, device, environment, console)


def choose(
    implementations: Sequence[Implementation],
    ours_patterns: Sequence[str],
    peer_patterns: Sequence[str],
) -> list[Implementation]:
    """Return the ceilings, and those of ours and of the peers whose names match a pattern.

    Raises:
        ValueError: if a pattern matches nothing.
    """
    patterns = {"ours": ours_patterns, "peer": peer_patterns, "ceiling": ("*",)}
    for family, wanted in patterns.items():
        names = [item.name for item in implementations if item.family == family]
        for pattern in wanted:
            if names and not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{pattern!r} matches none of {', '.join(names)}")
    return [
        item
        for item in implementations
        if any(fnmatchcase(item.name, pattern) for pattern in patterns[item.family])
    ]


def measure(
    options: argparse.Namespace,
    implementations: Sequence[Implementation],
    device: Device,
    environment: Environment,
    console: Console,
) -> int:
    """Measure all cases, write the JSON after each, and return the exit status."""
    settings, cases = _settings(options), _cases(options)
    record = RunRecord(
        op="head",
        started=datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ"),
        command=tuple(sys.argv[1:]),
        environment=environment,
        settings=asdict(settings),
        cells=(),
    )
    deadline = time.monotonic() + options.time_limit
    longest = 0.0
    with Display(console, len(cases)) as display:
        for index, case in enumerate(cases):
            start = time.monotonic()
            if index and start + longest > deadline:
                record = replace(record, not_reached=tuple(left.name for left in cases[index:]))
                write_record(record, options.output)
                console.print(f"time limit: not reached {', '.join(record.not_reached)}")
                break
            display.case(case)
            cell = measure_case(case, implementations, device, settings, display)
            record = replace(record, cells=(*record.cells, cell))
            path = write_record(record, options.output)
            console.print(cell_table(cell))
            console.print(f"[dim]{path}")
            longest = max(longest, time.monotonic() - start)
    return _verdict(record.cells, console)


def _verdict(cells: Sequence[CellRecord], console: Console) -> int:
    """Return 1 if one of ours failed or is wrong; a lack of memory is a result."""
    wrong = [
        f"{cell.case.name}: {item.implementation}, {item.rows} rows: "
        + (item.detail or f"{', '.join(item.exceeded_bounds)} too large")
        for cell in cells
        for item in cell.measurements
        if item.family == "ours" and (item.status == "failed" or item.exceeded_bounds)
    ]
    for line in wrong:
        console.print(f"[bold red]{line}")
    return 1 if wrong else 0


def check(implementations: Sequence[Implementation], seed: int, console: Console) -> int:
    """Check correctness on the CPU, print the errors, and return 1 if one is too large, else 0."""
    cases = tiny_sweep()
    with Display(console, len(cases)) as display:
        checks = check_cases(cases, implementations, seed=seed, display=display)
    output = Console(width=None if console.is_terminal else 160)
    output.print(errors_table(checks))
    wrong = [check for check in checks if check.exceeded]
    for check in wrong:
        output.print(
            f"[bold red]{check.case.name}: {check.implementation}, {check.rows} rows: "
            f"{', '.join(check.exceeded)} larger than rounding explains"
        )
    if wrong:
        return 1
    output.print("no CUDA device: correctness only, nothing timed, nothing written")
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    """Return the protocol's numbers; a given option wins over the preset."""
    settings = _QUICK if options.quick else Settings()
    given = {
        name: getattr(options, name)
        for name in ("repetitions", "budget_seconds")
        if getattr(options, name) is not None
    }
    return replace(settings, seed=options.seed, **given)


def _cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases of the sweep, restricted to the given options."""
    if options.quick:
        cases = quick_sweep()
    else:
        cases = sweep(
            options.shapes or SHAPES, options.tokens or TOKENS, options.fractions or FRACTIONS
        )
    return [
        case
        for case in cases
        if (not options.shapes or case.shape in options.shapes)
        and (not options.tokens or case.num_tokens in options.tokens)
        and (not options.fractions or case.active_fraction in options.fractions)
        and (case.mask in options.masks or case.active_fraction == 1.0)
    ]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.head", description=__doc__)
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="four cases that decide every target; planned for 6 minutes",
    )
    add("--shapes", nargs="+", metavar="H/V", help=f"default: {' '.join(SHAPES)}")
    add("--tokens", nargs="+", type=int, metavar="T", help=f"default: {TOKENS}")
    add("--fractions", nargs="+", type=float, metavar="A", help=f"default: {FRACTIONS}")
    add("--masks", nargs="+", choices=MASKS, default=MASKS, help="where completions are")
    add(
        "--peers",
        nargs="*",
        default=("*",),
        metavar="PATTERN",
        help="which peers; none given: none",
    )
    add("--ours", nargs="+", default=("*",), metavar="PATTERN", help="which of our modes")
    add("--repetitions", type=int, help="timed calls of each; slow ones get fewer")
    add("--budget-seconds", type=float, help="time for the samples of one entrant")
    add("--time-limit", type=float, default=float("inf"), metavar="SECONDS",
        help="begin no case that would end later; those left out are recorded")  # fmt: skip
    add("--output", type=Path, default=RESULTS, help="folder of the JSON")
    add("--commit", help="commit of a copy without its repository")
    add("--seed", type=int, default=0, help="of the data")
    add("--list", action="store_true", help="print the names of all that take part, and stop")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"bench.head: {error}")
