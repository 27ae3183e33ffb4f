"""``prefixrl convert verify``: two models side by side, as a table."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefixrl_mcore.checkpoint.convert.comparison import Comparison, compare_models, open_model
from prefixrl_mcore.eval.forward_comparison import (
    DEFAULT_PROMPTS,
    ForwardComparison,
    compare_forward,
    read_prompts,
)
from prefixrl_mcore.observability.progress import byte_progress

_MAX_ROWS = 20


def run_verify(first: Path, second: Path, *, with_forward: bool, prompts: Path | None) -> bool:
    """Compare two models, print how they differ, and return whether they are the same and whole.

    Args:
        first: a Hugging Face folder or a checkpoint.
        second: another.
        with_forward: compare forward passes, too.
        prompts: text file with one prompt per line, for that; None takes built-in ones.

    Raises:
        ValueError: if one of them is neither, incomplete or damaged.
    """
    texts = DEFAULT_PROMPTS if prompts is None else read_prompts(prompts)
    with (
        open_model(first) as one,
        open_model(second) as other,
        byte_progress(Console(stderr=True)) as progress,
    ):
        total = sum(info.num_bytes for info in one.weights.infos.values())
        task = progress.add_task("verify", total=total)
        found = compare_models(one, other, lambda number: progress.advance(task, number))
        forward = None
        if with_forward and not (found.faults or _differ_in_form(found)):
            forward = compare_forward(one, other, texts)
    _show_comparison(first, second, found, forward)
    if with_forward and forward is None:
        Console().print("forward passes not compared: the models differ in form, or are not whole")
    return not (found.differences or found.faults) and (forward is None or _is_equal(forward))


def _differ_in_form(found: Comparison) -> bool:
    """Return whether a forward pass of both would make no sense."""
    return any(one.what in ("missing", "shape", "config") for one in found.differences)


def _is_equal(forward: ForwardComparison) -> bool:
    return forward.max_logprob_difference == 0.0 and forward.top1_agreement == 1.0


def _show_comparison(
    first: Path, second: Path, found: Comparison, forward: ForwardComparison | None
) -> None:
    """Print the result, and of many differences the first ones."""
    console = Console()
    if found.differences:
        table = Table(title=f"{len(found.differences)} differences")
        for column in ("weight", "differs in", str(first), str(second), "max |difference|"):
            table.add_column(column, overflow="fold")
        for one in found.differences[:_MAX_ROWS]:
            gap = "" if one.max_difference is None else f"{one.max_difference:.3g}"
            table.add_row(*map(Text, (one.name, one.what, one.first, one.second, gap)))
        console.print(table)
        if len(found.differences) > _MAX_ROWS:
            console.print(f"and {len(found.differences) - _MAX_ROWS} more")
    for fault in found.faults:
        console.print(Text(fault, style="bold red"), soft_wrap=True)
    if found.differences:
        verdict = Text("different", style="bold red")
    elif found.faults:
        verdict = Text("equal as far as they go, but not whole", style="bold red")
    else:
        verdict = Text("equal, bit for bit", style="bold green")
    console.print(
        Text.assemble(
            verdict, f": {found.num_weights} weights, {found.num_bytes} bytes of {first} compared"
        )
    )
    console.print(Text(f"SHA-256 of the weights of {first}: {found.sha256}"), soft_wrap=True)
    if forward is not None:
        console.print(
            Text(
                f"forward: {forward.num_tokens} tokens, max |difference of logprobs| "
                f"{forward.max_logprob_difference:.3g} nats, top-1 agreement "
                f"{forward.top1_agreement:.4f}"
            )
        )
        if any(forward.num_nonfinite):
            ours, theirs = forward.num_nonfinite
            console.print(
                Text(
                    f"forward: logprobs that are NaN or infinite: {ours} tokens of {first}, "
                    f"{theirs} of {second}; nothing can be said of these models",
                    style="bold red",
                )
            )
