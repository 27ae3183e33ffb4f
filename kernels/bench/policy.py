"""``python -m bench.policy``: the whole policy, a Qwen3 of 0.6e9 parameters, in twenty updates.

On a GPU it trains with the local layers, with Transformer Engine's and, where the GPU has it, with
FP8, each on the same batch from the same seed, and writes tokens per second, MFU, peak memory and
the loss curve to a JSON file in ``bench/results``. What cannot run here is in the record with the
reason. ``--tiny`` is the same program with a tiny model, on any machine; without a GPU nothing is
written.

Unlike the rest of this folder it needs the trainer (``prefixrl_mcore``).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.environment import map_memory_in_growing_segments
from bench.gpu_record import write_record
from bench.policy_case import FULL, TINY, PolicyCase, PolicyResult, run_variant
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.policy import topology

RESULTS = Path(__file__).parent / "results"

VARIANTS: dict[str, dict[str, Any]] = {
    "local": {"layer_spec": "local"},
    "local, selective recomputation": {"layer_spec": "local", "recompute": "selective"},
    "transformer_engine": {"layer_spec": "transformer_engine"},
    "transformer_engine, fp8": {"layer_spec": "transformer_engine", "fp8": "hybrid"},
}
"""Name -> settings of ``policy``, all in bfloat16."""

_NUM_STEPS = 20
_LOSS_DIGITS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all variants and return the exit status: 1 if one failed that could run here."""
    options = _parse(arguments)
    console = Console(stderr=True)
    has_cuda = torch.cuda.is_available()
    if not has_cuda and not options.tiny:
        console.print("bench.policy: no CUDA device; --tiny runs a tiny model on the CPU")
        return 1
    if has_cuda:
        map_memory_in_growing_segments()
    case = TINY if options.tiny else FULL
    entries = [_run(case, name, settings, options, console) for name, settings in VARIANTS.items()]
    results = [entry["result"] for entry in entries if entry["status"] == "ok"]
    Console(width=None if console.is_terminal else 120).print(results_table(results))
    if has_cuda:
        console.print(
            f"[dim]{write_record('policy', case, {'variants': _as_json(entries)}, options)}"
        )
    else:
        console.print("no CUDA device: nothing written")
    return int(any(entry["status"] == "failed" for entry in entries))


def results_table(results: Sequence[PolicyResult]) -> Table:
    """Return what the variants took, one row each."""
    table = Table(
        *("layers", "tokens/s", "MFU", "peak GB", "s/step", "loss first", "loss last"),
        title=f"{len(results[0].losses)} updates" if results else "no variant ran",
    )
    for result in results:
        table.add_row(
            result.variant,
            f"{result.tokens_per_second:,.0f}",
            "peak of this device unknown" if result.mfu is None else f"{result.mfu:.1%}",
            "" if result.peak_bytes is None else f"{result.peak_bytes / 1e9:.2f}",
            f"{result.seconds:.3f}",
            f"{result.losses[0]:.{_LOSS_DIGITS}f}",
            f"{result.losses[-1]:.{_LOSS_DIGITS}f}",
        )
    return table


def _run(
    case: PolicyCase,
    name: str,
    settings: dict[str, Any],
    options: argparse.Namespace,
    console: Console,
) -> dict[str, Any]:
    """Return the outcome of one variant: ``ok``, ``refused`` by this machine, or ``failed``."""

    def report(step: int, seconds: float, loss: float) -> None:
        console.print(f"{name}: step {step + 1} {seconds:.3f} s, loss {loss:.{_LOSS_DIGITS}f}")

    try:
        result = run_variant(
            case, name, settings, num_steps=options.steps, seed=options.seed, report=report
        )
    except ConfigError as error:
        console.print(f"{name}: {error}")
        return {"variant": name, "status": "refused", "detail": str(error)}
    except Exception as error:  # out of memory, a kernel that is missing: a result, too
        console.print_exception()
        return {"variant": name, "status": "failed", "detail": f"{type(error).__name__}: {error}"}
    finally:
        topology.shut_down()
    return {"variant": name, "status": "ok", "result": result}


def _as_json(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the variants for the record."""
    return [
        {**entry, "result": asdict(entry["result"])} if "result" in entry else entry
        for entry in entries
    ]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.policy", description=__doc__)
    add = parser.add_argument
    add("--tiny", action="store_true", help="a tiny model, on any machine")
    add("--steps", type=int, default=_NUM_STEPS, help="updates of each variant")
    add("--output", type=Path, default=RESULTS, help="folder of the JSON")
    add("--commit", help="commit of a copy without its repository")
    add("--seed", type=int, default=0, help="of weights and data")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"bench.policy: {error}")
