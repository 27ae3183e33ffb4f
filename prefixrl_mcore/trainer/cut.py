"""``prefixrl prefixes``: cut prefixes from the trace store, once for the run."""

import time
from contextlib import ExitStack
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.data.prefix_cuts import PrefixStats, answer_finder, cut_prefixes
from prefixrl_mcore.data.prefixes import write_prefixes
from prefixrl_mcore.data.problem_sets import read_training_problems
from prefixrl_mcore.data.prompts import PromptRenderer
from prefixrl_mcore.data.traces import TraceStore
from prefixrl_mcore.observability.run_folder import RunFolder
from prefixrl_mcore.rewards.build import build_verifier


def cut(config: RunConfig) -> PrefixStats:
    """Cut and write the prefixes of all training problems that have a trace.

    Doing it again with the same store and settings changes nothing.

    Raises:
        ValueError: if the store has another tokenizer or template, a trace is too long, a prefix
            leaves no room, or other prefixes are there already.
    """
    start = time.perf_counter()
    folder = RunFolder(config.run_folder)
    folder.check(config)
    renderer = PromptRenderer(config.model.path, config.data.prompt)
    store = TraceStore.open(
        config.traces_folder,
        tokenizer_hash=renderer.tokenizer_hash,
        chat_template_hash=renderer.chat_template_hash,
    )
    with ExitStack() as stack:
        verifier = build_verifier(config.reward)
        stack.callback(verifier.close)
        prefixed, stats = cut_prefixes(
            [record.as_trace() for record in store.traces()],
            read_training_problems(config),
            config.prefixes,
            max_total_tokens=config.rollout.max_total_tokens,
            max_completion_tokens=config.rollout.max_completion_tokens,
            finds_answer=answer_finder(verifier, renderer),
        )
    folder.claim(config)
    write_prefixes(
        config.prefixes_folder,
        prefixed,
        config=config.prefixes,
        tokenizer_hash=renderer.tokenizer_hash,
        chat_template_hash=renderer.chat_template_hash,
        stats=stats,
    )
    folder.add_stage_seconds("prefixes", time.perf_counter() - start)
    table = Table(title=escape(f"prefixes in {config.prefixes_folder}"), show_header=False)
    for name, value in asdict(stats).items():
        table.add_row(name.replace("_", " "), f"{value:,.6g}")
    Console(stderr=True).print(table)
    return stats
