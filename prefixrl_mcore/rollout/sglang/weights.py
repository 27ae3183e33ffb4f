"""The weights that the servers are to have: what they are called, and bringing them there."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from prefixrl_mcore.rollout.sglang.member import Member, State
from prefixrl_mcore.rollout.weight_sync.sync import MakeBuckets, is_incomplete
from prefixrl_mcore.rollout.weight_sync.syncer import Syncer
from prefixrl_mcore.rollout.weight_sync.transport import SyncTarget

_TRAINERS_NAME = re.compile(r"[0-9a-f]+:-?[0-9]+")
"""What ``weights_name`` returns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """The weights that all servers have, or are to get."""

    name: str
    """What the servers call them; no other trainer's weights have this name."""

    policy_version: int
    """Optimizer steps applied to them; -1 for those that the servers began with."""

    make_buckets: MakeBuckets | None
    """Begins their stream, as often as it is called; None for those that servers began with."""


def weights_name(run: str, policy_version: int) -> str:
    """Return what servers call the weights of a run, whose name is hexadecimal."""
    return f"{run}:{policy_version}"


def are_usable(names: Collection[str], *, own: str) -> bool:
    """Return whether servers with weights of these names may be sampled from as they are.

    Args:
        names: one of each server.
        own: the name that this run gave to servers of its own.
    """
    found = next(iter(names))
    is_foreign = found != own and _TRAINERS_NAME.fullmatch(found) is not None
    return len(set(names)) == 1 and not is_incomplete(found) and not is_foreign


def send_weights(
    weights: Weights,
    members: Sequence[Member],
    syncer: Syncer,
    *,
    num_ranks: int,
    bury: Callable[[Member, str], None],
) -> None:
    """Bring weights to servers; those who have them are UPDATING then.

    Args:
        weights: what to send.
        members: to whom.
        syncer: brings it.
        num_ranks: tensor-parallel ranks of each server.
        bury: declares a server dead that did not get them.

    Raises:
        EngineError: if the stream is not the model's weights, or servers hold others than they were
            sent; all that live are STARTING then.
    """
    assert weights.make_buckets is not None, "weights that came as a stream"
    for member in members:
        member.move_to(State.UPDATING, f"to {weights.name!r}")
    targets = [
        SyncTarget(
            client=member.client,
            num_ranks=num_ranks,
            name=member.name,
            gpus=member.gpus,
            is_here=member.is_here,
        )
        for member in members
    ]
    by_name = {member.name: member for member in members}

    def give_up(name: str, cause: str) -> None:
        if by_name[name].state is not State.DEAD:
            bury(by_name[name], f"has not got weights {weights.name!r}: {cause}")

    try:
        report = syncer.sync(targets, weights.make_buckets, weights.name, give_up)
    except BaseException as error:
        for member in [one for one in members if one.state is State.UPDATING]:
            member.move_to(State.STARTING, f"the update ended: {error}")
        raise
    for name, cause in report.failed.items():
        give_up(name, cause)
    for member in [one for one in members if one.state is State.UPDATING]:
        member.served_weights = weights.name
