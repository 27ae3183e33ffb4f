"""Whether two models say the same of the same texts, as transformers computes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

from prefixrl_mcore.checkpoint.convert.comparison import OpenModel

DEFAULT_PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Solve for x: 3x + 7 = 22. First subtract 7 from both sides, which gives 3x =",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "1 2 3 4 5 6 7 8 9 10 11 12 13",
    "Die Summe der Winkel eines Dreiecks ist 180 Grad. \u4e09\u89d2\u5f62",
)
"""Texts of several kinds, so that many rows of the embedding take part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardComparison:
    """Two models' forward passes side by side."""

    num_tokens: int
    """Tokens of the prompts that were predicted."""

    max_logprob_difference: float
    """Largest absolute difference of a token's logprob, nats; NaN if one of them is not finite."""

    top1_agreement: float
    """Share of predictions whose most likely token is the same, 0-1."""

    num_nonfinite: tuple[int, int]
    """Tokens whose logprob is NaN or infinite, in the first and in the second model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Predictions:
    """What one model says of one prompt of S tokens."""

    logprobs: Tensor
    """[S-1] float32, nats, of the tokens that follow."""

    top1: Tensor
    """[S-1] int64, most likely tokens."""


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the lines of a text file that are not blank.

    Raises:
        ValueError: if it cannot be read or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {path}: cannot be read: {error}; name a text file") from None
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"prompts {path}: no line with text; write one prompt per line")
    return prompts


def compare_forward(
    first: OpenModel, second: OpenModel, prompts: Sequence[str]
) -> ForwardComparison:
    """Run both models on the prompts, one model in memory at a time, each in its stored type.

    A model of several types runs in the smallest that holds the numbers of all.

    Args:
        first: a model; its tokenizer makes the tokens.
        second: another of the same vocabulary.
        prompts: texts.

    Raises:
        ValueError: if the first has no tokenizer, or no prompt has two tokens.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(first.assets)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{first.assets}: has no tokenizer that can be read ({error}); copy the model's "
            "tokenizer files there, or compare without --forward"
        ) from None
    token_ids = [tokenizer(prompt, return_tensors="pt").input_ids[0] for prompt in prompts]
    token_ids = [ids for ids in token_ids if len(ids) > 1]
    if not token_ids:
        raise ValueError("prompts: none has two tokens or more, so that nothing is predicted")
    ours, theirs = _predict(first, token_ids), _predict(second, token_ids)
    return _compare(_joined(ours), _joined(theirs))


def _joined(parts: Sequence[_Predictions]) -> _Predictions:
    return _Predictions(
        logprobs=torch.cat([part.logprobs for part in parts]),
        top1=torch.cat([part.top1 for part in parts]),
    )


def _compare(ours: _Predictions, theirs: _Predictions) -> ForwardComparison:
    gaps = (ours.logprobs - theirs.logprobs).abs()
    nonfinite = [int((~one.logprobs.isfinite()).sum()) for one in (ours, theirs)]
    return ForwardComparison(
        num_tokens=len(gaps),
        max_logprob_difference=float("nan") if any(nonfinite) else float(gaps.max()),
        top1_agreement=float((ours.top1 == theirs.top1).double().mean()),
        num_nonfinite=(nonfinite[0], nonfinite[1]),
    )


@torch.no_grad()
def _predict(model: OpenModel, token_ids: Sequence[Tensor]) -> list[_Predictions]:
    dtypes = {info.dtype for info in model.weights.infos.values()}
    config = AutoConfig.from_pretrained(model.assets)
    architecture = cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])  # a class, loaded late
    network = architecture.from_pretrained(
        None,
        config=config,
        state_dict={name: model.weights.read(name) for name in model.weights.infos},
        dtype=reduce(torch.promote_types, dtypes),  # holds every number of float16 and bfloat16
    ).eval()
    found: list[_Predictions] = []
    for ids_S in token_ids:
        logits_SV = network(input_ids=ids_S[None]).logits[0, :-1].float()
        logprobs_SV = logits_SV.log_softmax(-1)
        found.append(
            _Predictions(
                logprobs=logprobs_SV.gather(1, ids_S[1:, None])[:, 0], top1=logits_SV.argmax(-1)
            )
        )
    return found
