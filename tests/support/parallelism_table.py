"""``python -m tests.support.parallelism_table``: the tables of ``docs/parallelism.md``.

Runs every layout of ``layouts.CASES`` and prints one Markdown line for each, then the refused
combinations with their errors. With ``--write FILE`` the text between the file's marks is replaced
instead. Fails if a layout is outside the tests' tolerances.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefixrl_mcore.config.layout import check_divisible, check_stream, check_supported
from prefixrl_mcore.config.policy import ParallelConfig
from prefixrl_mcore.policy import topology
from prefixrl_mcore.policy.model_config import read_hf_config, read_model_shape
from tests.support.layouts import (
    CASES,
    Errors,
    LayoutCase,
    assert_within_tolerance,
    measure,
    train_alone,
    train_on_ranks,
)
from tests.support.tiny_models import build_tiny_families

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

_TP, _PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
_CP, _EP = "context_parallel_size", "expert_model_parallel_size"
REFUSED: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("sequence parallel without TP", "qwen3", {"sequence_parallel": True}, 96),
    (
        "virtual stages without PP",
        "qwen3",
        {"virtual_pipeline_model_parallel_size": 2},
        96,
    ),
    ("TP 4, 2 key-value heads", "qwen3", {_TP: 4}, 96),
    ("PP 3, 4 layers", "qwen3", {_PP: 3}, 96),
    (
        "PP 4 x VPP 2, 4 layers",
        "qwen3",
        {_PP: 4, "virtual_pipeline_model_parallel_size": 2},
        96,
    ),
    ("CP 2, streams of 98 tokens", "qwen3", {_CP: 2}, 98),
    (
        "CP 2 x TP 2 with SP, streams of 98 tokens",
        "qwen3",
        {_CP: 2, _TP: 2, "sequence_parallel": True},
        98,
    ),
    (
        "PP 2 x TP 2 with SP, streams of 97 tokens",
        "qwen3",
        {_PP: 2, _TP: 2, "sequence_parallel": True},
        97,
    ),
    ("EP 2, dense model", "qwen3", {_EP: 2, "data_parallel_size": 2}, 96),
    ("EP 4 over 2 ranks", "qwen3-moe", {_EP: 4, "data_parallel_size": 2}, 96),
    (
        "EP 2 x ETP 2 over 2 ranks",
        "qwen3-moe",
        {_EP: 2, "expert_tensor_parallel_size": 2, "data_parallel_size": 2},
        96,
    ),
    (
        "ETP 5, experts 48 wide",
        "qwen3-moe",
        {"expert_tensor_parallel_size": 5, "data_parallel_size": 5},
        96,
    ),
    ("EP 3, 4 experts", "qwen3-moe", {_EP: 3, "data_parallel_size": 3}, 96),
    ("experts with TP but no SP", "qwen3-moe", {_TP: 2}, 96),
)
"""(what, model, ``policy.parallel``, stream tokens) that must be refused."""


def main() -> None:
    """Print or write both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="file whose marked text is replaced")
    target: Path | None = parser.parse_args().write
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        lines = [*_exactness(Path(folder)), "", *_refusals(Path(folder))]
    text = "\n".join(lines) + "\n"
    if target is None:
        sys.stdout.write(text)
        return
    before, _, rest = target.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    target.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def _exactness(folder: Path) -> Iterator[str]:
    """Yield the table layout x error."""
    references = {
        name: train_alone(model, folder / name) for name, model in build_tiny_families().items()
    }
    topology.shut_down()
    yield "| model | layout | processes | logprobs | gradients | gradient norm | weights |"
    yield "|---|---|---|---|---|---|---|"
    for case in CASES:
        reference = references[case.model]
        errors = measure(train_on_ranks(reference.folder, case), reference)
        assert_within_tolerance(errors)
        line = _line(case, errors)
        sys.stderr.write(line + "\n")
        yield line


def _line(case: LayoutCase, errors: Errors) -> str:
    """Return one row of the table."""
    layout = " ".join(part.upper() for part in case.name.split("-"))
    layout += ", distributed optimizer" if case.distributed else ""
    layout += f", {case.experts} experts" if case.experts else ""
    layout += ", full recomputation" if case.recompute == "full" else ""
    cells = (
        case.model,
        layout,
        str(case.parallel.world_size),
        f"{errors.logprobs:.1e}",
        f"{errors.gradients:.1e}",
        f"{errors.gradient_norm:.1e}",
        f"{errors.weights:.1e}",
    )
    return f"| {' | '.join(cells)} |"


def _refusals(folder: Path) -> Iterator[str]:
    """Yield the table of refused combinations."""
    yield "| combination | error |"
    yield "|---|---|"
    for what, model, parallel, stream_tokens in REFUSED:
        yield f"| {what} | {_refusal(folder / model, parallel, stream_tokens)} |"


def _refusal(folder: Path, parallel: dict[str, Any], stream_tokens: int) -> str:
    """Return the error's text, in one line."""
    try:
        layout = ParallelConfig.model_validate(parallel)
        check_supported(layout)
        check_divisible(read_model_shape(read_hf_config(folder)), layout)
        check_stream(layout, stream_tokens)
    except ValueError as error:
        text = str(error)
        if "Value error, " in text:  # pydantic's frame around a message of ours
            text = text.partition("Value error, ")[2].partition(" [type=")[0]
        return " ".join(text.split())
    raise AssertionError(f"{parallel} with streams of {stream_tokens} tokens is not refused")


if __name__ == "__main__":
    main()
