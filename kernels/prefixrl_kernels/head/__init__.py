"""Language-model head: logprobs and entropies of given rows, without the full logits.

Shape suffixes: ``R`` rows, ``H`` hidden size, ``V`` this rank's share of the vocabulary.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from prefixrl_kernels.head import reference

_MAX_CHUNK_BYTES = 256 * 1024**2
"""Default bound on one chunk of float32 logits."""


def head_logprobs(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    temperature: float = 1.0,
    true_vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the logprob of each row's target and the entropy of each row's distribution.

    With ``logits = hidden @ weight.T / temperature`` in float32 and ``p = softmax(logits)`` over
    the columns below ``true_vocab_size``, the results are ``log p[target]`` and ``-sum(p log p)``.
    Differentiable, once, in ``hidden_RH`` and ``weight_VH``. At no time are more than
    ``chunk_rows`` rows of logits in memory: the backward pass computes them again.

    All ranks of ``tp_group`` must call this and its backward pass, with equal ``hidden_RH`` and
    ``targets_R``. The gradient of ``hidden_RH`` is summed over the group, so that it is complete
    and equal on every rank.

    Args:
        hidden_RH: [R, H] float, the rows to predict from; R may be 0.
        weight_VH: [V, H] float, this rank's rows of the output embedding.
        targets_R: [R] int64 token ids in the whole vocabulary, below ``true_vocab_size``.
        temperature: divides the logits; must be positive.
        true_vocab_size: tokens of the vocabulary; rows of the embedding from there on are padding
            and get no probability and no gradient.
        tp_group: ranks that share the vocabulary; None when ``weight_VH`` is all of it.
        vocab_start: token id of the first row of ``weight_VH``.
        chunk_rows: rows of logits held at once; None bounds them at 256 MiB.

    Returns:
        logprobs_R: [R] float32, nats.
        entropies_R: [R] float32, nats.

    Raises:
        ValueError: if shapes, dtypes or ranges do not fit.
    """
    _check(hidden_RH, weight_VH, targets_R, temperature, true_vocab_size, vocab_start, chunk_rows)
    if chunk_rows is None:
        chunk_rows = max(1, _MAX_CHUNK_BYTES // (4 * weight_VH.size(0)))
    return reference.head_logprobs(
        hidden_RH,
        weight_VH,
        targets_R,
        temperature=temperature,
        true_vocab_size=true_vocab_size,
        tp_group=tp_group,
        vocab_start=vocab_start,
        chunk_rows=chunk_rows,
    )


def _check(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    temperature: float,
    true_vocab_size: int,
    vocab_start: int,
    chunk_rows: int | None,
) -> None:
    """Refuse arguments that do not fit together; reads nothing back from the device."""
    if hidden_RH.dim() != 2 or weight_VH.dim() != 2 or hidden_RH.size(1) != weight_VH.size(1):
        raise ValueError(
            f"head_logprobs: expected hidden [R, H] and weight [V, H], got "
            f"{tuple(hidden_RH.shape)} and {tuple(weight_VH.shape)}"
        )
    if targets_R.dtype != torch.int64 or targets_R.shape != hidden_RH.shape[:1]:
        raise ValueError(
            f"head_logprobs: expected targets [{hidden_RH.size(0)}] int64, got "
            f"{tuple(targets_R.shape)} {targets_R.dtype}"
        )
    if hidden_RH.dtype != weight_VH.dtype or not hidden_RH.is_floating_point():
        raise ValueError(
            f"head_logprobs: hidden and weight must have one floating dtype, got "
            f"{hidden_RH.dtype} and {weight_VH.dtype}"
        )
    if temperature <= 0.0:
        raise ValueError(f"head_logprobs: temperature must be positive, got {temperature}")
    if true_vocab_size < 1 or vocab_start < 0:
        raise ValueError(
            f"head_logprobs: true_vocab_size must be at least 1 and vocab_start at least 0, got "
            f"{true_vocab_size} and {vocab_start}"
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"head_logprobs: chunk_rows must be at least 1, got {chunk_rows}")
