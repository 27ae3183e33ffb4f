"""Hand-worked placements of requests on servers."""

import pytest

from prefixrl_mcore.rollout.sglang.schedule import (
    CompletionLengths,
    Cost,
    Load,
    choose_server,
    longest_first,
    max_over_mean,
)

A, B = (1, 2, 3), (4, 5)


def cost_of(context_tokens: int, completion_tokens: float) -> Cost:
    return Cost(context_tokens=context_tokens, completion_tokens=completion_tokens)


def place(costs: list[Cost], contexts: list[tuple[int, ...]], num_servers: int) -> list[int]:
    """Place requests of one sample each as they come, with room for all of them."""
    loads = {index: Load() for index in range(num_servers)}
    chosen = []
    for cost, context in zip(costs, contexts, strict=True):
        server = choose_server(cost, context, 1, loads, max_samples=99)
        assert server is not None
        loads[server].outstanding_tokens += loads[server].cost_of(cost, context)
        loads[server].contexts.add(context)
        chosen.append(server)
    return chosen


def test_nothing_observed_means_that_the_limit_is_expected() -> None:
    lengths = CompletionLengths()

    assert lengths.expected_tokens(100) == 100

    lengths.observe(10)
    lengths.observe(30)
    assert lengths.expected_tokens(100) == 20
    assert lengths.expected_tokens(15) == 15


def test_mean_forgets_what_lies_far_back() -> None:
    lengths = CompletionLengths()
    for _ in range(5000):
        lengths.observe(10)
    for _ in range(5000):
        lengths.observe(100)

    assert 99 < lengths.mean_tokens <= 100


def test_longest_go_first_and_equal_ones_keep_their_order() -> None:
    costs = [cost_of(5, 10), cost_of(1, 30), cost_of(10, 5), cost_of(2, 40)]

    assert longest_first(costs) == [3, 1, 0, 2]


def test_each_request_goes_where_it_is_done_first() -> None:
    # Loads after each: 9|0, 9|8, 9|15, 15|15, 15+4|15.
    costs = [cost_of(0, tokens) for tokens in (9, 8, 7, 6, 4)]
    contexts = [(index,) for index in range(5)]

    assert place(costs, contexts, 2) == [0, 1, 1, 0, 0]


def test_equal_contexts_share_a_server_until_it_is_behind_by_more_than_it_saves() -> None:
    # Context of 10 tokens, 4 to sample. Server 0 holds 14, then 18: at 14 + 4 against 0 + 14 the
    # other server is the earlier one; at 14 + 4 against 14 + 4 the first is taken.
    assert place([cost_of(10, 4)] * 3, [A, A, A], 2) == [0, 1, 0]
    # Context of 100: the second at 104 + 4 against 104 of an idle server, so it moves; beside a
    # server that has 60 tokens of its own the cache wins: 104 + 4 < 60 + 104.
    loads = {
        0: Load(outstanding_tokens=104.0, outstanding_samples=1, contexts={A}),
        1: Load(outstanding_tokens=60.0, outstanding_samples=1, contexts={B}),
    }
    assert choose_server(cost_of(100, 4), A, 1, loads, max_samples=99) == 0
    assert choose_server(cost_of(2, 4), B, 1, loads, max_samples=99) == 1


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [
        pytest.param(2, 0, id="the less busy one"),
        pytest.param(4, 1, id="the one with room"),
        pytest.param(6, None, id="wait"),
    ],
)
def test_full_server_gets_nothing_more(num_samples: int, expected: int | None) -> None:
    loads = {
        0: Load(outstanding_tokens=10.0, outstanding_samples=6),
        1: Load(outstanding_tokens=20.0, outstanding_samples=3),
    }

    assert choose_server(cost_of(1, 1), A, num_samples, loads, max_samples=8) == expected


def test_idle_server_takes_a_request_that_is_larger_than_the_bound() -> None:
    assert choose_server(cost_of(1, 1), A, 64, {0: Load()}, max_samples=8) == 0


def test_imbalance_is_the_largest_over_the_mean() -> None:
    assert max_over_mean([30.0, 10.0, 20.0]) == 1.5
    assert max_over_mean([0.0, 0.0]) == 1.0
