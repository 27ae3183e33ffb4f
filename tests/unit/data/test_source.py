"""The mixture source: epochs, steps across epochs, exact resume."""

import json
import logging
import random
from collections import Counter

import pytest

from prefixrl_mcore.data.source import MixtureSource, original_problems, union
from prefixrl_mcore.records import PrefixedProblem, Problem, Prompt


def _items(count: int) -> list[PrefixedProblem]:
    return [
        PrefixedProblem(
            prefixed_problem_id=f"p{index:03d}",
            problem=Problem(problem_id=f"p{index:03d}", text="x", answer="1"),
            prompt_token_ids=(1,),
        )
        for index in range(count)
    ]


def _ids(items: list[PrefixedProblem]) -> list[str]:
    return [item.prefixed_problem_id for item in items]


@pytest.mark.parametrize(("num_items", "per_step"), [(10, 3), (10, 7), (10, 10), (7, 6), (12, 4)])
def test_every_epoch_has_every_item_once_and_no_step_has_one_twice(
    num_items: int, per_step: int
) -> None:
    source = MixtureSource(_items(num_items), seed=3)
    steps = [_ids(source.take(per_step)) for _ in range(5 * num_items)]
    assert all(len(set(step)) == per_step for step in steps)
    stream = [name for step in steps for name in step]
    for begin in range(0, len(stream) - num_items + 1, num_items):
        assert len(set(stream[begin : begin + num_items])) == num_items
    assert source.num_repeats == 0


def test_a_large_union_covers_many_epochs_evenly() -> None:
    source = MixtureSource(_items(40), seed=0)
    counts = Counter(name for _ in range(100) for name in _ids(source.take(16)))
    assert set(counts.values()) == {40}


def test_epochs_differ_and_are_shuffled() -> None:
    source = MixtureSource(_items(50), seed=0)
    first, second = _ids(source.take(50)), _ids(source.take(50))
    assert sorted(first) == sorted(second) == _ids(_items(50))
    assert len({tuple(first), tuple(second), tuple(_ids(_items(50)))}) == 3


def test_the_order_depends_on_the_seed_and_not_on_the_order_of_the_list() -> None:
    forward = MixtureSource(_items(20), seed=1)
    backward = MixtureSource(_items(20)[::-1], seed=1)
    other = MixtureSource(_items(20), seed=2)
    taken = [_ids(source.take(20)) for source in (forward, backward, other)]
    assert taken[0] == taken[1] != taken[2]


def test_the_split_into_steps_does_not_change_an_epoch_that_no_step_crosses() -> None:
    by_four = MixtureSource(_items(20), seed=1)
    by_five = MixtureSource(_items(20), seed=1)
    assert [n for _ in range(10) for n in _ids(by_four.take(4))] == [
        n for _ in range(8) for n in _ids(by_five.take(5))
    ]


@pytest.mark.parametrize(("num_items", "per_step"), [(10, 3), (10, 7), (5, 12)])
def test_resume_is_exact_at_every_step(num_items: int, per_step: int) -> None:
    source = MixtureSource(_items(num_items), seed=3)
    states, taken = [], []
    for _ in range(4 * num_items):
        states.append(json.dumps(source.state()))
        taken.append(_ids(source.take(per_step)))
    for index, state in enumerate(states):
        resumed = MixtureSource(_items(num_items), seed=3)
        resumed.load_state(json.loads(state))
        assert json.dumps(resumed.state()) == state
        assert [_ids(resumed.take(per_step)) for _ in taken[index : index + 5]] == taken[
            index : index + 5
        ]


def test_taking_more_than_there_are_repeats_evenly_and_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = MixtureSource(_items(5), seed=0)
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            counts = Counter(_ids(source.take(12)))
            assert len(counts) == 5
            assert set(counts.values()) == {2, 3}
    assert source.num_repeats == 70
    assert [record.message for record in caplog.records] == [
        "one step takes 12 prompts but there are only 5; the rest are repeated as groups of their "
        "own; lower batch.prompts_per_step to avoid that"
    ]


def test_an_item_that_is_always_given_back_does_not_crowd_out_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = MixtureSource(_items(4), seed=0)
    used = Counter[str]()
    for _ in range(60):
        items = source.take(2)
        assert len(set(_ids(items))) == 2
        hard = [item for item in items if item.prefixed_problem_id == "p003"]
        used.update(_ids([item for item in items if item not in hard]))
        source.give_back(hard)
    assert min(used[name] for name in ("p000", "p001", "p002")) >= 19  # 60 places for three
    assert source.num_repeats == 0
    assert not caplog.records


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_given_back_no_item_is_lost_favoured_or_taken_twice_at_once(seed: int) -> None:
    rng = random.Random(seed)
    num_items = rng.randint(1, 12)
    source = MixtureSource(_items(num_items), seed=seed)
    used = Counter[str]()
    for _ in range(300):
        items = source.take(rng.randint(1, num_items))
        assert len(set(_ids(items))) == len(items)
        back = [item for item in items if rng.random() < 0.4]
        used.update(_ids([item for item in items if item not in back]))
        source.give_back(rng.sample(back, len(back)))
        state = json.dumps(source.state())
        turns = used + Counter(json.loads(state)["returned"])
        # An epoch gives every item one turn, which it has used or still has.
        numbers = [turns[name] for name in _ids(_items(num_items))]
        assert max(numbers) - min(numbers) <= 1
        if rng.random() < 0.1:
            source = MixtureSource(_items(num_items), seed=seed)
            source.load_state(json.loads(state))
            assert json.dumps(source.state()) == state
    assert source.num_repeats == 0


def test_a_position_in_another_set_or_order_is_refused() -> None:
    state = MixtureSource(_items(5), seed=0).state()
    with pytest.raises(ValueError, match="seed of the saved position is 0, of this run 1"):
        MixtureSource(_items(5), seed=1).load_state(state)
    other = MixtureSource(_items(6), seed=0)
    with pytest.raises(ValueError, match="fingerprint of the saved position"):
        other.load_state(state)
    assert _ids(other.take(6)) == _ids(MixtureSource(_items(6), seed=0).take(6))


def test_bad_sets_and_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="got no problems"):
        MixtureSource([], seed=0)
    with pytest.raises(ValueError, match="id 'p000' occurs twice"):
        MixtureSource(_items(2) + _items(1), seed=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        MixtureSource(_items(2), seed=0).take(0)


def _prefixed(problem: Problem, prompt: tuple[int, ...]) -> PrefixedProblem:
    return PrefixedProblem(
        prefixed_problem_id=f"{problem.problem_id}#t@1",
        problem=problem,
        prompt_token_ids=prompt,
        prefix_token_ids=(9,),
        trace_id="t",
        fraction=0.5,
    )


def test_the_union_holds_originals_and_prefixed_problems() -> None:
    problem = Problem(problem_id="p", text="x", answer="1")
    originals = original_problems([Prompt(problem=problem, token_ids=(1, 2))])
    assert originals == [
        PrefixedProblem(prefixed_problem_id="p", problem=problem, prompt_token_ids=(1, 2))
    ]
    prefixed = _prefixed(problem, (1, 2))
    assert union([prefixed], originals) == [originals[0], prefixed]


def test_a_prefix_of_a_changed_or_unknown_problem_is_refused() -> None:
    problem = Problem(problem_id="p", text="x", answer="1")
    originals = original_problems([Prompt(problem=problem, token_ids=(1, 2))])
    with pytest.raises(ValueError, match=r"'p#t@1': its prompt \(3 tokens\) differs"):
        union([_prefixed(problem, (1, 2, 3))], originals)
    stranger = Problem(problem_id="q", text="x", answer="1")
    with pytest.raises(ValueError, match="problem 'q' is not among the 1 training problems"):
        union([_prefixed(stranger, (1, 2))], originals)


def test_what_is_given_back_comes_first_and_nothing_is_lost() -> None:
    whole = MixtureSource(_items(12), seed=3)
    expected = [item.prefixed_problem_id for item in whole.take(12)]
    source = MixtureSource(_items(12), seed=3)
    first = source.take(6)
    source.give_back([first[4], first[1]])

    second = source.take(5)
    third = source.take(3)

    names = [item.prefixed_problem_id for item in (*second, *third)]
    assert names == [expected[4], expected[1], *expected[6:12]]
    assert source.num_repeats == 0


def test_a_given_back_item_does_not_come_twice_in_one_take() -> None:
    source = MixtureSource(_items(4), seed=0)
    source.give_back(source.take(4))  # at the end of the epoch: the next one has them all again

    first, second = source.take(3), source.take(3)

    for taken in (first, second):
        assert len({item.prefixed_problem_id for item in taken}) == 3
    third = source.take(2)  # 4 given back and 4 of the next epoch are 8 in all
    counts = Counter(item.prefixed_problem_id for item in (*first, *second, *third))
    assert set(counts.values()) == {2}
    assert source.num_repeats == 0


def test_an_item_given_back_in_the_next_epoch_has_its_turn_there_later() -> None:
    source = MixtureSource(_items(4), seed=0)
    first, (begun,) = source.take(4), source.take(1)
    source.give_back([item for item in first if item != begun][:1])

    taken = source.take(3) + source.take(1)

    counts = Counter(_ids([begun, *taken]))
    assert len(counts) == 4  # all of the second epoch, and the one given back again
    assert len(set(_ids(taken[:3]))) == 3
    assert source.num_repeats == 0


def test_a_position_with_given_back_items_is_exact() -> None:
    source = MixtureSource(_items(7), seed=1)
    source.give_back(source.take(5)[2:])
    source.take(1)
    state = json.loads(json.dumps(source.state()))
    again = MixtureSource(_items(7), seed=1)
    again.load_state(state)
    assert [source.take(4) for _ in range(5)] == [again.take(4) for _ in range(5)]
