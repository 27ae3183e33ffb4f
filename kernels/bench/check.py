"""The check on a machine without a GPU: everything against float64, on tiny sizes, untimed.

Triton kernels run in the interpreter, and what peers compile runs uncompiled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from bench.cases import Case, Inputs, Rows, build_inputs, select_rows
from bench.display import Display
from bench.implementation import Implementation, NotInstalledError, Runner, errors_of
from bench.reference import Errors, Truth, compute_truth

_INTERPRETER_SLACK = 2.0
"""Triton 3.6's interpreter cuts float32 down to bfloat16 where a GPU rounds to the nearest, which
doubles the error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """How far one implementation is from the truth on one case."""

    case: Case
    """Sizes and mask."""

    implementation: str
    """Name of the implementation."""

    rows: Rows
    """Rows that it was given."""

    errors: Errors
    """Distance from the truth."""

    exceeded: tuple[str, ...] = ()
    """Names of the errors that are too large to be rounding."""

    not_installed: bool = False
    """Whether it could not be checked, for lack of its package."""


def check_cases(
    cases: Sequence[Case],
    implementations: Sequence[Implementation],
    *,
    seed: int,
    display: Display,
) -> list[Check]:
    """Check every implementation that runs on a CPU, in every case and with every set of rows.

    An implementation that raises stops the check: on tiny sizes there is no excuse.
    """
    checks = []
    with torch.compiler.set_stance("force_eager"):
        for case in cases:
            display.case(case)
            inputs = build_inputs(case, torch.device("cpu"), seed)
            for implementation in implementations:
                if implementation.runs_on_cpu:
                    display.step(implementation.name)
                    checks += _check(implementation, inputs)
    return checks


def errors_table(checks: Sequence[Check]) -> Table:
    """Return the largest error of every implementation over all cases, for a terminal."""
    table = Table(
        title="largest errors against float64",
        caption="CPU, Triton's interpreter; nothing is timed",
    )
    for heading in ("implementation", "rows"):
        table.add_column(heading, no_wrap=True)
    for heading in ("logprob (max)", "loss", "dH (rel.)", "dW (rel.)", "verdict"):
        table.add_column(heading, justify="right", no_wrap=True)
    for implementation, rows in dict.fromkeys((c.implementation, c.rows) for c in checks):
        group = [c for c in checks if (c.implementation, c.rows) == (implementation, rows)]
        errors = [_largest(group, name) for name in Errors.__slots__]
        table.add_row(
            implementation,
            rows,
            *("-" if error is None else f"{error:.1e}" for error in errors),
            _verdict(group),
        )
    return table


def _largest(checks: Sequence[Check], name: str) -> float | None:
    """Return the largest error of one kind, NaN before any number; None where there is none."""
    errors = [getattr(check.errors, name) for check in checks]
    return max(
        (error for error in errors if error is not None),
        key=lambda error: float("inf") if error != error else error,
        default=None,
    )


def _verdict(checks: Sequence[Check]) -> str:
    """Return the last column of the table."""
    if all(check.not_installed for check in checks):
        return "not installed"
    exceeded = dict.fromkeys(name for check in checks for name in check.exceeded)
    return f"[bold red]too large: {', '.join(exceeded)}[/]" if exceeded else "ok"


def _check(implementation: Implementation, inputs: Inputs) -> list[Check]:
    """Check one implementation on one case with every set of rows."""
    truth = compute_truth(inputs, entropy_coefficient=implementation.entropy_coefficient)
    bounds = _widened(implementation.bounds(truth.max_abs_logit))
    checks = []
    for rows in inputs.case.row_sets:
        try:
            runner = implementation.prepare(select_rows(inputs, rows))
        except NotInstalledError:
            errors = None
        else:
            errors = _run(runner, implementation, truth)
        checks.append(
            Check(
                case=inputs.case,
                implementation=implementation.name,
                rows=rows,
                errors=errors or Errors(),
                exceeded=tuple(errors.exceeded(bounds)) if errors else (),
                not_installed=errors is None,
            )
        )
    return checks


def _widened(bounds: Errors) -> Errors:
    """Return the bounds of gradients for the interpreter's way of rounding."""
    return replace(
        bounds,
        **{
            name: _INTERPRETER_SLACK * bound
            for name in ("hidden_relative", "weight_relative")
            if (bound := getattr(bounds, name)) is not None
        },
    )


def _run(runner: Runner, implementation: Implementation, truth: Truth) -> Errors:
    """Run everything that an implementation can do, and return its errors."""
    runner.acquire()
    try:
        if "forward" in implementation.passes:
            runner.forward()
        outputs = None
        if "forward_backward" in implementation.passes:
            outputs = runner.forward_backward()
        return errors_of(runner, outputs, truth)
    finally:
        runner.release()
