"""``prefixrl traces import | verify | show | stats``."""

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from prefixrl_mcore.config.data import PromptConfig
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.data.import_report import ImportReport
from prefixrl_mcore.data.problem_sets import read_training_problems
from prefixrl_mcore.data.prompts import PromptRenderer
from prefixrl_mcore.data.trace_files import TraceFormat
from prefixrl_mcore.data.trace_import import Keep
from prefixrl_mcore.data.trace_import import import_traces as import_file
from prefixrl_mcore.data.traces import TraceStore, check_hash
from prefixrl_mcore.data.verification import verify_store
from prefixrl_mcore.observability.atomic import write_json_atomic
from prefixrl_mcore.observability.run_folder import RunFolder
from prefixrl_mcore.rewards.build import build_verifier

_SHOWN_ROWS = 10


def import_traces(
    config: RunConfig, *, file: Path, file_format: TraceFormat, source: str, keep: Keep
) -> ImportReport:
    """Verify the traces of a file, store the right ones, and print what became of each.

    Raises:
        ValueError: if the file is malformed, or the store belongs to another tokenizer.
    """
    folder = RunFolder(config.run_folder)
    folder.check(config)
    renderer = PromptRenderer(config.model.path, config.data.prompt)
    with ExitStack() as stack:
        verifier = build_verifier(config.reward)
        stack.callback(verifier.close)
        store = TraceStore.open_or_create(
            config.traces_folder,
            tokenizer_hash=renderer.tokenizer_hash,
            chat_template_hash=renderer.chat_template_hash,
            model=str(config.model.path),
        )
        report = import_file(
            file,
            file_format=file_format,
            source_model=source,
            store=store,
            problems=read_training_problems(config),
            renderer=renderer,
            verifier=verifier,
            keep=keep,
            max_total_tokens=config.rollout.max_total_tokens,
        )
    folder.claim(config)
    out = folder.path / f"import-{file.stem}.json"
    write_json_atomic(out, asdict(report))
    _print_import(report, Console(stderr=True), out)
    return report


def verify_traces(config: RunConfig) -> bool:
    """Verify every stored trace again; print the failures; return whether there were none."""
    console = Console(stderr=True)
    renderer = PromptRenderer(config.model.path, config.data.prompt)
    store = TraceStore.open(
        config.traces_folder,
        tokenizer_hash=renderer.tokenizer_hash,
        chat_template_hash=renderer.chat_template_hash,
    )
    with ExitStack() as stack:
        verifier = build_verifier(config.reward)
        stack.callback(verifier.close)
        report = verify_store(store, read_training_problems(config), verifier, renderer)
    console.print(
        f"{report.num_verified} of {report.num_traces} traces verify with {report.verifier}"
    )
    if report.failures:
        table = Table("trace", "problem", "reference", "extracted", "reason")
        for failure in report.failures:
            table.add_row(
                failure.trace_id,
                failure.problem_id,
                Text(failure.answer),
                Text(failure.extracted),
                failure.reason,
            )
        console.print(table)
    return not report.failures


def show_traces(
    folder: Path, *, problem_id: str | None, limit: int, model: Path | None = None
) -> None:
    """Print stored traces as text, decoded with the tokenizer of the model they were made for.

    Args:
        folder: the trace store.
        problem_id: show only this problem's traces; None shows all.
        limit: most traces shown; how many are left is said.
        model: folder of the tokenizer; None takes the one that the store names.

    Raises:
        ValueError: if there is no store, or no trace of the problem.
    """
    store = TraceStore.open(folder)
    decode = _renderer_of(store, model).decode
    records = [r for r in store.traces() if problem_id in (None, r.problem_id)]
    if not records:
        what = "no traces" if problem_id is None else f"no trace of problem {problem_id!r}"
        raise ValueError(f"trace store {folder}: {what}; see `prefixrl traces stats {folder}`")
    console = Console()
    for record in records[:limit]:
        console.rule(f"{record.trace_id} ({record.source_model})")
        console.print(Text(decode(record.prompt_token_ids), style="dim"))
        console.print(Text(decode(record.completion_token_ids), style="green"))
        console.print(
            f"{len(record.completion_token_ids)} tokens, {record.finish_reason}, "
            f"{record.num_tries} tries, {record.flops:.3g} FLOPs, {record.verifier}",
            highlight=False,
        )
    if len(records) > limit:
        console.print(f"{len(records) - limit} more; raise --limit to see them")


def show_stats(folder: Path) -> None:
    """Print the totals of a store.

    Raises:
        ValueError: if there is no store.
    """
    print_stats(TraceStore.open(folder), Console())


def print_stats(store: TraceStore, console: Console) -> None:
    """Print the totals of a store as a table."""
    stats = asdict(store.stats())
    table = Table(title=escape(f"trace store {store.folder}"), show_header=False)
    for name, value in stats.items():
        shown = json.dumps(value) if isinstance(value, dict) else f"{value:,.6g}"
        table.add_row(name.replace("_", " "), Text(shown))
    console.print(table)


def _renderer_of(store: TraceStore, model: Path | None) -> PromptRenderer:
    """Return a renderer that decodes the store's token ids.

    Raises:
        ValueError: if the model's folder is not there, or has another tokenizer.
    """
    plain = PromptConfig(style="text", template="{problem}")
    renderer = PromptRenderer(model or Path(store.header.model), plain)
    check_hash("tokenizer", store.folder, store.header.tokenizer_hash, renderer.tokenizer_hash)
    return renderer


def _print_import(report: ImportReport, console: Console, out: Path) -> None:
    """Print counts by reason, agreement with labels, and the first disagreements."""
    table = Table(title="import", show_header=False)
    table.add_row("traces in the file", str(report.num_candidates))
    table.add_row("stored", str(report.num_accepted))
    for reason, count in sorted(report.reasons.items()):
        table.add_row(f"not stored: {reason}", str(count))
    if report.label_agreement is not None:
        table.add_row(
            "verifier agrees with labels",
            f"{report.label_agreement:.4%} of {report.num_labelled}",
        )
    if report.num_inexact_texts:
        table.add_row("texts changed by the tokenizer", str(report.num_inexact_texts))
    for name, count in report.ignored_fields.items():
        table.add_row(f"ignored field {name!r}", f"{count} lines")
    console.print(table)
    if report.disagreements:
        shown = Table("where", "reference", "label", "extracted", "reason")
        for item in report.disagreements[:_SHOWN_ROWS]:
            shown.add_row(
                item.where, Text(item.answer), str(item.label), Text(item.extracted), item.reason
            )
        console.print(shown)
    console.print(f"every rejection and disagreement: {out}", highlight=False)
