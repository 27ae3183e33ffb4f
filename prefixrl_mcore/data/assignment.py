"""Which sequence goes into which stream, and which stream to which rank.

Deterministic: ties are broken by position, so that every rank finds the same assignment.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unit:
    """Sequences that are placed together."""

    members: tuple[int, ...]
    length: int
    cost: float


def assign_to_streams(
    *,
    lengths: Sequence[int],
    costs: Sequence[float],
    group_indices: Sequence[int],
    stream_tokens: int,
    multiple: int,
) -> list[list[int]]:
    """Return for each stream the indices of its sequences, ascending.

    Groups that fit into one stream stay whole. The number of streams is what
    first-fit-decreasing needs, rounded up to ``multiple``; the units are then spread over all of
    them by cost, and only if that does not fit the first-fit assignment is kept.

    Args:
        lengths: [num_sequences] tokens, none above ``stream_tokens``.
        costs: [num_sequences] relative FLOPs.
        group_indices: [num_sequences] equal for sequences of one group.
        stream_tokens: capacity of a stream.
        multiple: the number of streams is a multiple of this.
    """
    units = _units(lengths, costs, group_indices, stream_tokens)
    packed = _first_fit_decreasing(units, stream_tokens)
    num_streams = math.ceil(len(packed) / multiple) * multiple
    spread = _spread_by_cost(units, stream_tokens, num_streams)
    chosen = spread if spread is not None else packed
    chosen += [[] for _ in range(num_streams - len(chosen))]
    return [sorted(index for unit in stream for index in unit.members) for stream in chosen]


def order_for_ranks(stream_costs: Sequence[float], num_ranks: int) -> tuple[list[int], float]:
    """Return an order of the streams in which ``order[r::num_ranks]`` cost each rank the same.

    Streams are dealt in rounds of ``num_ranks``, costliest first, the costliest of a round to the
    rank with the least so far; so streams that run at the same time also cost about the same.

    Args:
        stream_costs: [num_streams] a multiple of ``num_ranks``.
        num_ranks: data-parallel ranks.

    Returns:
        The order, and the cost of the busiest rank divided by the mean over ranks.
    """
    by_cost = sorted(range(len(stream_costs)), key=lambda i: (-stream_costs[i], i))
    loads = [0.0] * num_ranks
    order: list[int] = []
    for begin in range(0, len(by_cost), num_ranks):
        least_loaded = sorted(range(num_ranks), key=lambda rank: (loads[rank], rank))
        dealt = [0] * num_ranks
        for rank, stream in zip(least_loaded, by_cost[begin : begin + num_ranks], strict=True):
            dealt[rank] = stream
            loads[rank] += stream_costs[stream]
        order.extend(dealt)
    mean = sum(loads) / num_ranks
    return order, max(loads) / mean if mean else 1.0


def _units(
    lengths: Sequence[int], costs: Sequence[float], group_indices: Sequence[int], stream_tokens: int
) -> list[_Unit]:
    """Return whole groups where they fit, single sequences otherwise; longest first."""
    groups: dict[int, list[int]] = {}
    for index, group_index in enumerate(group_indices):
        groups.setdefault(group_index, []).append(index)
    units: list[_Unit] = []
    for members in groups.values():
        fits = sum(lengths[i] for i in members) <= stream_tokens
        for part in [members] if fits else [[i] for i in members]:
            units.append(
                _Unit(
                    members=tuple(part),
                    length=sum(lengths[i] for i in part),
                    cost=sum(costs[i] for i in part),
                )
            )
    return sorted(units, key=lambda unit: (-unit.length, unit.members))


def _first_fit_decreasing(units: Sequence[_Unit], stream_tokens: int) -> list[list[_Unit]]:
    """Place each unit, longest first, into the first stream with room."""
    streams: list[list[_Unit]] = []
    room: list[int] = []
    for unit in units:
        target = next((i for i, free in enumerate(room) if unit.length <= free), None)
        if target is None:
            target = len(streams)
            streams.append([])
            room.append(stream_tokens)
        streams[target].append(unit)
        room[target] -= unit.length
    return streams


def _spread_by_cost(
    units: Sequence[_Unit], stream_tokens: int, num_streams: int
) -> list[list[_Unit]] | None:
    """Place each unit into the cheapest stream with room; None when one finds no room."""
    streams: list[list[_Unit]] = [[] for _ in range(num_streams)]
    room = [stream_tokens] * num_streams
    costs = [0.0] * num_streams
    for unit in units:
        fitting = [i for i in range(num_streams) if unit.length <= room[i]]
        if not fitting:
            return None
        target = min(fitting, key=lambda i: (costs[i], i))
        streams[target].append(unit)
        room[target] -= unit.length
        costs[target] += unit.cost
    return streams
