"""Proof that servers hold the policy's weights: the same digests on both sides.

A server reports a digest of every tensor that each of its ranks holds: fused (query, key and value;
gate and up; all experts of a layer) and cut for tensor parallelism. The weights of the policy are
exported once more, cut and put in the same order, and hashed in the same way. So a wrong or
stale tensor is found whatever the transport was, unless the export itself is wrong; that, the
log-prob gap between engine and policy would show.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.faults import ServerRefusal
from prefixrl_mcore.rollout.weight_sync.digests import CpuDigest, Digest, GpuDigest
from prefixrl_mcore.rollout.weight_sync.fused import fused_part
from prefixrl_mcore.rollout.weight_sync.transport import Failures, SyncTarget, on_all

_EXPERT = re.compile(r"^(.*\.mlp\.experts)\.\d+\.(gate|up|down)_proj\.weight$")
_FROM_ROWS = re.compile(r"\.(o|down)_proj\.weight$")
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_VOCABULARY_MULTIPLE = 64
"""SGLang pads the vocabulary to a multiple of it, with zeros."""

_NAMES_SHOWN = 5

_WITHOUT = "--rollout.sglang.sync.checksum-every-syncs None does without (TOML cannot say None)"


class WeightsDifferError(EngineError):
    """A server holds other weights than it was sent; the message names server and tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """What came of a comparison in which no weights differed."""

    num_digests: int
    """Digests that agree, of all ranks of all servers that told theirs."""

    failed: Failures
    """Servers that were lost before they told."""


def check_weights(
    targets: Sequence[SyncTarget],
    weights: Iterator[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    num_key_value_heads: int,
    is_cuda: bool,
) -> Compared:
    """Compare all targets' weights with the policy's; return what was compared, and who was lost.

    Args:
        targets: servers of the same model; nothing may be in flight.
        weights: (Hugging Face name, full weight) pairs of the policy.
        dtype: type that the servers keep their weights in.
        num_key_value_heads: of the model; ranks beyond it hold copies.
        is_cuda: whether the servers run on GPUs.

    Raises:
        WeightsDifferError: naming the server and the tensors that differ.
        EngineError: if a server refuses to tell, or tells of other ranks than it has.
    """
    sizes = {target.num_ranks for target in targets}
    ours = Digests(sizes, dtype=dtype, num_key_value_heads=num_key_value_heads, is_cuda=is_cuda)
    for name, weight in weights:
        ours.add(name, weight)
    num_digests = 0
    reported: dict[str, dict[int, Mapping[str, str]]] = {}

    def ask(target: SyncTarget) -> None:
        reported[target.name] = _reported(target)

    lost = on_all(targets, ask)  # at once: they hash for a while, and one may hang
    hint = f"should every server do so: {_WITHOUT}"
    failed = {name: f"{cause}; {hint}" for name, cause in lost.items()}
    for target in [target for target in targets if target.name in reported]:
        for rank, theirs in reported[target.name].items():
            expected = ours.of_rank(target.num_ranks, rank)
            _compare(expected, theirs, where=f"{target.name}, rank {rank}")
            num_digests += len(expected)
    return Compared(num_digests=num_digests, failed=failed)


def _reported(target: SyncTarget) -> dict[int, Mapping[str, str]]:
    """Return the digests of every tensor-parallel rank of a server.

    Raises:
        EngineError: if it refuses, as every server of its kind would, or tells of other ranks, or
            in another form.
        ServerFault: if it is lost.
    """
    try:
        answer = target.client.checksums()
    except ServerRefusal as refusal:
        if refusal.status >= 500:  # what is left of a server that dies says so
            raise
        raise EngineError(
            f"weight sync: {target.name} does not tell the checksums of its weights: {refusal}; "
            f"{_WITHOUT}"
        ) from refusal
    reported: dict[int, Mapping[str, str]] = {}
    try:
        ranks: Sequence[Mapping[str, Any]] = answer.get("ranks") or []
        for one in ranks:
            reported[_rank_of(one["parallelism_info"])] = dict(one["checksums"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise EngineError(
            f"weight sync: {target.name} tells the checksums of its weights in a form that is not "
            f"known here, {type(error).__name__} {error} in {str(answer)[:200]!r}; {_WITHOUT}"
        ) from error
    if sorted(reported) != list(range(target.num_ranks)):
        raise EngineError(
            f"weight sync: {target.name} reports the checksums of ranks {sorted(reported)}, "
            f"expected 0 to {target.num_ranks - 1}"
        )
    return reported


def _rank_of(place: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> int:
    """Return a tensor-parallel rank; 0.5.23 lists it for each model of the rank (drafts too)."""
    one = place if isinstance(place, Mapping) else place[0]
    return int(one["tp_rank"])


def _compare(ours: Mapping[str, str], theirs: Mapping[str, str], *, where: str) -> None:
    """Refuse a server with other weights.

    Raises:
        WeightsDifferError: naming the tensors.
    """
    faults = {
        "differ": sorted(n for n in ours.keys() & theirs.keys() if ours[n] != theirs[n]),
        "are the policy's only": sorted(ours.keys() - theirs.keys()),
        "are the server's only": sorted(theirs.keys() - ours.keys()),
    }
    told = [
        f"{len(names)} {what}: {', '.join(names[:_NAMES_SHOWN])}"
        + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")
        for what, names in faults.items()
        if names
    ]
    if told:
        raise WeightsDifferError(
            f"weight sync: the weights of {where} are not the policy's; of {len(ours)} tensors "
            f"{'; '.join(told)}. What it samples cannot be trusted; another transport "
            "(rollout.sglang.sync.transport) may get them across. Where the log-prob gap says that "
            "engine and policy agree all the same, the comparison itself may be wrong for this "
            f"model: {_WITHOUT}"
        )


@dataclass(kw_only=True, slots=True)
class _Rank:
    """The tensors of one rank of a server."""

    size: int
    rank: int
    digests: dict[str, Digest] = field(default_factory=dict)


class Digests:
    """The digests that ranks of servers must report."""

    def __init__(
        self, sizes: set[int], *, dtype: torch.dtype, num_key_value_heads: int, is_cuda: bool
    ) -> None:
        self._ranks = {(n, rank): _Rank(size=n, rank=rank) for n in sizes for rank in range(n)}
        self._dtype = dtype
        self._num_key_value_heads = num_key_value_heads
        self._new = GpuDigest if is_cuda else CpuDigest

    def add(self, name: str, weight: Tensor) -> None:
        """Add a weight; the parts of a fused tensor come in its order."""
        held = _held_name(name)
        weight = weight.detach().to(self._dtype)
        for one in self._ranks.values():
            part = self._part(name, weight, one)
            digest = one.digests.get(held)
            if digest is None:
                digest = one.digests[held] = self._new()
            digest.update(part)

    def of_rank(self, size: int, rank: int) -> dict[str, str]:
        """Return name -> digest of everything that a rank of so many holds."""
        return {name: one.value() for name, one in self._ranks[size, rank].digests.items()}

    def _part(self, name: str, weight: Tensor, one: _Rank) -> Tensor:
        """Return the part of a weight that a rank holds."""
        if name in _VOCABULARY:
            return _vocabulary_part(weight, one)
        if _FROM_ROWS.search(name):
            return weight.chunk(one.size, dim=1)[one.rank]
        fused = fused_part(name)
        if fused is None:
            return weight
        if fused.part in ("k", "v") and one.size > self._num_key_value_heads:
            copies = one.size // self._num_key_value_heads
            return weight.chunk(self._num_key_value_heads)[one.rank // copies]
        return weight.chunk(one.size)[one.rank]


def _vocabulary_part(weight: Tensor, one: _Rank) -> Tensor:
    """Return a rank's rows of an embedding or a head, zeros behind its end."""
    num_rows = -(-weight.shape[0] // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE // one.size
    rows = weight[one.rank * num_rows : (one.rank + 1) * num_rows]
    padding = weight.new_zeros(num_rows - rows.shape[0], weight.shape[1])
    return torch.cat([rows, padding])


def _held_name(name: str) -> str:
    """Return the name of the tensor that a server keeps a weight in."""
    if (match := _EXPERT.match(name)) is not None:
        return f"{match[1]}.{'w2' if match[2] == 'down' else 'w13'}_weight"
    part = fused_part(name)
    return name if part is None else f"{part.fused}.{part.kind}"
