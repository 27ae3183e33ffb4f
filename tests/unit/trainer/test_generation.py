"""Which groups a step samples, keeps, carries over and gives back; by a scripted engine."""

import base64
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from prefixrl_mcore.observability.phases import Phases
from prefixrl_mcore.records import Completion, Group, StartedGroup, VersionSpan
from prefixrl_mcore.rollout.engine import (
    EngineError,
    IsEnough,
    OnCompleted,
    RolloutError,
    SampleRequest,
    SamplingParams,
    never_enough,
)
from prefixrl_mcore.rollout.group_sampling import sample_started
from prefixrl_mcore.rollout.interruption import SamplingInterrupted
from prefixrl_mcore.rollout.sampling import derive_seed
from prefixrl_mcore.trainer.generated_state import (
    generated_from,
    generated_state,
    started_from,
    started_state,
)
from prefixrl_mcore.trainer.generation import Generated, Generator, staleness_metrics
from prefixrl_mcore.trainer.step_metrics import rollout_metrics
from tests.support.scripted_engine import (
    GROUP_SIZE,
    ScriptedEngine,
    scripted_config,
    scripted_generator,
    scripted_source,
)


def order_of(num_problems: int) -> list[int]:
    """Return the problems in the order in which the source has them."""
    return [item.prompt_token_ids[0] for item in scripted_source(num_problems).take(num_problems)]


def problems_of(groups: tuple[Group, ...]) -> list[int]:
    return [group.prefixed_problem.prompt_token_ids[0] for group in groups]


def generate(generator: Generator, step: int) -> Generated:
    return generator.generate(step, phases=Phases())


def test_by_default_a_step_samples_its_problems_and_nothing_else() -> None:
    source, engine = scripted_source(8), ScriptedEngine({})
    generator = scripted_generator(scripted_config(3), source, engine)

    generated = generate(generator, 5)

    assert problems_of(generated.groups) == order_of(8)[:3]
    (requests,) = engine.calls
    assert [request.request_id for request in requests] == ["5/0", "5/1", "5/2"]
    assert [r.seed for r in requests] == [derive_seed(0, "5", index) for index in range(3)]
    names = [s.rollout.rollout_id for group in generated.groups for s in group.rollouts]
    assert names == ["5/0/0", "5/0/1", "5/1/0", "5/1/1", "5/2/0", "5/2/1"]
    assert generated.num_sampled_tokens == 3 * GROUP_SIZE * (1 + 4)
    assert generated.num_cached_tokens == 3 * GROUP_SIZE
    assert generated.figures == {}
    assert generated.dropped == ()
    assert generator.carried == []


def test_oversampling_keeps_the_first_that_finish_and_loses_no_problem() -> None:
    order = order_of(12)
    source = scripted_source(12)
    engine = ScriptedEngine({order[0]: (4, 9), order[1]: (3, 3), order[2]: (2, 2)})
    generator = scripted_generator(scripted_config(2, oversampling=1.5), source, engine)

    generated = generate(generator, 0)

    assert problems_of(generated.groups) == [order[1], order[2]]  # in the order of the source
    # The first problem's rollouts had 3 tokens each when the second one's were done.
    assert generated.figures == {
        "rollout/num_begun_groups": 3.0,
        "rollout/num_aborted_groups": 1.0,
        "rollout/discarded_tokens": 6.0,
    }
    assert generated.num_sampled_tokens == 2 * (1 + 3) + 2 * (1 + 3) + 2 * (1 + 2)
    assert generated.num_new_tokens == 16
    engine.lengths[order[0]] = (1, 1)  # it would be aborted again and again
    seen = Counter(problems_of(generated.groups))
    seen.update(
        problem for step in range(1, 4) for problem in problems_of(generate(generator, step).groups)
    )
    assert seen == Counter(order[:8])
    assert engine.calls[1][0].context_token_ids == (order[0],)  # from its beginning


def test_the_number_of_begun_groups_is_that_of_decimal_arithmetic() -> None:
    generator = scripted_generator(
        scripted_config(50, oversampling=1.1), scripted_source(60), ScriptedEngine({})
    )
    assert generate(generator, 0).figures["rollout/num_begun_groups"] == 55.0


def test_a_group_that_finished_at_the_same_moment_is_given_back_as_well() -> None:
    source = scripted_source(8)

    class AllAtOnce(ScriptedEngine):
        """Every request finishes in the same step of the decoder."""

        def sample(
            self,
            requests: Sequence[SampleRequest],
            params: SamplingParams,
            on_completed: OnCompleted | None = None,
            is_enough: IsEnough = never_enough,
        ) -> list[list[Completion]]:
            sampled = super().sample(requests, params)
            for index in (3, 1, 0):
                is_enough(index, sampled[index])
            return sampled

    generator = scripted_generator(scripted_config(2, oversampling=2.0), source, AllAtOnce({}))
    generated = generate(generator, 0)

    order = order_of(8)
    assert problems_of(generated.groups) == [order[1], order[3]]
    assert generated.figures["rollout/discarded_tokens"] == 2 * GROUP_SIZE * 4
    assert problems_of(generate(generator, 1).groups) == [order[2], order[5]]


def test_a_generation_that_fails_leaves_source_and_carried_groups_as_they_were() -> None:
    order = order_of(8)
    source, engine = scripted_source(8), ScriptedEngine({order[0]: (4, 9)})
    generator = scripted_generator(scripted_config(2, **partial()), source, engine)
    generate(generator, 0)
    engine.policy_version = 1
    before = source.state(), list(generator.carried)
    original = engine.sample

    def fail(*_: Any, **__: Any) -> Any:
        raise EngineError("gone")

    engine.sample = fail
    with pytest.raises(EngineError, match="gone"):
        generate(generator, 1)
    assert (source.state(), generator.carried) == before
    engine.sample = original
    assert problems_of(generate(generator, 1).groups) == [order[3], order[4]]


def partial(max_staleness: int = 1, **more: Any) -> dict[str, Any]:
    return {"oversampling": 1.5, "partial": True, "max_staleness": max_staleness, **more}


def test_a_carried_group_goes_on_from_its_tokens_with_their_versions() -> None:
    order = order_of(8)
    source, engine = scripted_source(8), ScriptedEngine({order[0]: (4, 9)})
    generator = scripted_generator(scripted_config(2, **partial()), source, engine)

    first = generate(generator, 0)
    # Problems 1 and 2 of the source and one rollout of problem 0 were done at token 4.
    assert problems_of(first.groups) == [order[1], order[2]]
    assert [group.num_tokens for group in generator.carried] == [8]
    assert first.figures["rollout/num_carried_groups"] == 1.0
    assert first.figures["rollout/discarded_tokens"] == 0.0
    engine.policy_version = 1
    second = generate(generator, 1)

    (request, *_) = engine.calls[1]
    assert request.request_id == "1/0.1"  # of the rollout that was not finished
    assert request.context_token_ids == (order[0], 100, 101, 102, 103)
    assert request.max_completion_tokens == 50 - 4
    assert len(engine.calls[1]) == 3
    assert problems_of(second.groups) == [order[3], order[4]]
    assert [group.oldest_version for group in generator.carried] == [0]
    assert [group.num_tokens for group in generator.carried] == [4 + 4 + 4]


def test_tokens_that_would_be_too_old_are_sampled_again() -> None:
    order = order_of(8)
    source, engine = scripted_source(8), ScriptedEngine({order[0]: (4, 30)})
    generator = scripted_generator(scripted_config(2, **partial()), source, engine)
    for version in range(3):
        engine.policy_version = version
        generated = generate(generator, version)
        expired = generated.figures["rollout/num_expired_groups"]
        assert expired == float(version == 2)  # of version 0, to be trained on by version 2
    assert generated.figures["rollout/discarded_tokens"] == 4 + 4 + 4
    assert [g.oldest_version for g in generator.carried] == [2]


def test_with_overlap_tokens_are_one_update_older_when_they_are_trained_on() -> None:
    order = order_of(8)
    source, engine = scripted_source(8), ScriptedEngine({order[0]: (4, 30)})
    schedule = partial(2, overlap=True)
    generator = scripted_generator(scripted_config(2, **schedule), source, engine)
    figures = []
    for version in range(3):
        engine.policy_version = version
        figures.append(generate(generator, version).figures["rollout/num_expired_groups"])
    assert figures == [0.0, 0.0, 1.0]  # 2 + 1 - 0 is more than 2


def test_carried_groups_finish_with_spans_of_every_version() -> None:
    order = order_of(4)
    lengths = {order[0]: (4, 9), order[1]: (4, 4), order[2]: (4, 4), order[3]: (20, 20)}
    source, engine = scripted_source(4), ScriptedEngine(lengths)
    generator = scripted_generator(scripted_config(2, **partial(3)), source, engine)
    generate(generator, 0)
    engine.policy_version = 1
    generated = generate(generator, 1)

    assert order[0] in problems_of(generated.groups)
    assert generated.figures["rollout/num_continued_groups"] == 1.0
    index = problems_of(generated.groups).index(order[0])
    short, long = (s.rollout.completion for s in generated.groups[index].rollouts)
    assert [s.rollout.rollout_id for s in generated.groups[index].rollouts] == ["0/0/0", "0/0/1"]
    assert long.token_ids == tuple(range(100, 109))
    assert long.logprobs == (-1.0,) * 4 + (-2.0,) * 5
    assert long.earlier_spans == (VersionSpan(policy_version=0, num_tokens=4),)
    assert (long.policy_version, long.finish_reason) == (1, "stop")
    assert short.version_spans == (VersionSpan(policy_version=0, num_tokens=4),)
    # What goes on has its tokens so far as context: 1 + 4 for its 5 new ones.
    assert staleness_metrics(generated.groups[index : index + 1], 1, max_staleness=3) == {
        "rollout/staleness_mean": pytest.approx(8 / 13),
        "rollout/staleness_max": 1.0,
    }


def test_cached_tokens_of_the_steps_are_those_of_the_completions_they_sampled() -> None:
    order = order_of(4)
    lengths = {order[0]: (4, 9), order[1]: (4, 4), order[2]: (4, 4), order[3]: (20, 20)}
    source, engine = scripted_source(4), ScriptedEngine(lengths)
    generator = scripted_generator(scripted_config(2, **partial(3)), source, engine)
    steps = [generate(generator, 0)]
    engine.policy_version = 1
    steps.append(generate(generator, 1))

    finished = [s.rollout.completion for g in steps for group in g.groups for s in group.rollouts]
    carried = [one for group in generator.carried for one in group.completions]
    by_step = [generated.num_cached_tokens for generated in steps]
    assert sum(by_step) == sum(one.num_cached_tokens for one in finished + carried)
    assert max(one.num_cached_tokens for one in finished) == 2  # of a request in either step
    for generated in steps:
        num_context_tokens = generated.num_sampled_tokens - generated.num_new_tokens
        fraction = rollout_metrics(generated)["rollout/cached_context_fraction"]
        assert fraction == generated.num_cached_tokens / num_context_tokens
    # Of 6 requests for a context of 1 token 1 was cached each; later one has 4 more tokens.
    assert rollout_metrics(steps[0])["rollout/cached_context_fraction"] == 1.0
    assert rollout_metrics(steps[1])["rollout/cached_context_fraction"] < 1.0


DYNAMIC = {"dynamic_sampling": True, "max_rounds": 3}


def test_groups_without_signal_are_replaced_and_charged() -> None:
    order = order_of(8)
    source, engine = scripted_source(8), ScriptedEngine({})
    with_signal = frozenset({order[1], order[3], order[4]})
    generator = scripted_generator(scripted_config(3, **DYNAMIC), source, engine, with_signal)

    generated = generate(generator, 7)

    assert problems_of(generated.groups) == [order[1], order[3], order[4]]
    assert problems_of(generated.dropped) == [order[0], order[2]]
    assert [[r.request_id for r in call] for call in engine.calls] == [
        ["7/0", "7/1", "7/2"],
        ["7+1/0", "7+1/1"],
    ]
    assert generated.num_sampled_tokens == 5 * GROUP_SIZE * 5
    assert generated.figures == {
        "rollout/num_rounds": 2.0,
        "rollout/num_dropped_groups": 2.0,
        "rollout/num_filled_groups": 0.0,
    }


def test_an_interruption_throws_the_rounds_before_away_too() -> None:
    order = order_of(8)
    source, engine = scripted_source(8), ScriptedEngine({})
    with_signal = frozenset({order[1]})
    generator = scripted_generator(scripted_config(3, **DYNAMIC), source, engine, with_signal)
    before = source.state()
    original = engine.sample

    def interrupted_in_the_second_round(*arguments: Any, **options: Any) -> Any:
        if not engine.calls:
            return original(*arguments, **options)
        raise SamplingInterrupted(9, 6, 2)

    engine.sample = interrupted_in_the_second_round
    with pytest.raises(SamplingInterrupted) as caught:
        generate(generator, 7)
    # 3 groups of 2 completions of 4 tokens after a context of 1, which is taken from the cache.
    assert caught.value.num_tokens == 3 * GROUP_SIZE * 5 + 9
    assert caught.value.num_new_tokens == 3 * GROUP_SIZE * 4 + 6
    assert caught.value.num_cached_tokens == 3 * GROUP_SIZE + 2
    assert source.state() == before


def test_what_lacks_after_the_last_round_is_filled_up_in_order() -> None:
    order = order_of(12)
    source, engine = scripted_source(12), ScriptedEngine({})
    with_signal = frozenset({order[2]})
    generator = scripted_generator(scripted_config(3, **DYNAMIC), source, engine, with_signal)

    generated = generate(generator, 0)

    assert problems_of(generated.groups) == [order[2], order[0], order[1]]
    assert problems_of(generated.dropped) == order[3:7]
    assert [group.has_signal for group in generated.groups] == [True, False, False]
    assert generated.figures == {
        "rollout/num_rounds": 3.0,
        "rollout/num_dropped_groups": 4.0,
        "rollout/num_filled_groups": 2.0,
    }


def test_what_is_sampled_and_carried_survives_json_exactly() -> None:
    order = order_of(8)
    source, engine = scripted_source(8), ScriptedEngine({order[0]: (4, 30)})
    schedule = partial(2, **DYNAMIC)
    with_signal = frozenset(order[3:])
    generator = scripted_generator(scripted_config(2, **schedule), source, engine, with_signal)
    generated = generate(generator, 0)
    engine.policy_version = 1
    generated = generate(generator, 1)
    assert generator.carried

    state = json.loads(json.dumps([started_state(generator.carried), generated_state(generated)]))

    assert started_from(state[0], source.find) == generator.carried
    assert generated_from(state[1], source.find) == generated


def completion_of(**changes: Any) -> Completion:
    values: dict[str, Any] = {
        "token_ids": (1, 2, 3),
        "logprobs": (-0.1, -1e-300, -12.123456789012345),
        "finish_reason": "stop",
        "policy_version": 4,
    }
    return Completion(**(values | changes))


def started_of(completion: Completion) -> StartedGroup:
    (problem,) = scripted_source(1).take(1)
    return StartedGroup(group_id="0/0", prefixed_problem=problem, completions=(completion,))


def test_logprobs_come_back_to_the_last_bit() -> None:
    group = started_of(completion_of())
    (again,) = started_from(json.loads(json.dumps(started_state([group]))), scripted_source(1).find)
    assert again == group


@pytest.mark.parametrize(
    ("logprobs", "num_bytes"),
    [((-0.5, -0.0, -12.25), 3 * 4), ((-0.1, -0.5, -0.5), 3 * 8), ((-1e300, -0.5, -0.5), 3 * 8)],
    ids=["exact in 32 bits", "not exact", "beyond 32 bits"],
)
def test_logprobs_are_stored_in_32_bits_where_that_is_exact(
    logprobs: tuple[float, ...], num_bytes: int
) -> None:
    group = started_of(completion_of(logprobs=logprobs))
    state = started_state([group])
    stored = state[0]["completions"][0]["logprobs"]
    assert len(zlib.decompress(base64.b64decode(stored))) == num_bytes
    assert started_from(state, scripted_source(1).find) == [group]


def test_rollouts_of_earlier_versions_are_read() -> None:
    group = started_of(completion_of(logprobs=(-0.5, -0.25, -1.0)))
    state = started_state([group])
    wide = np.asarray((-0.5, -0.25, -1.0), "<f8").tobytes()
    state[0]["completions"][0]["logprobs"] = base64.b64encode(zlib.compress(wide)).decode()
    assert started_from(state, scripted_source(1).find) == [group]


class _Answering(ScriptedEngine):
    """Gives every request the same answers."""

    def __init__(self, *answers: Completion) -> None:
        super().__init__({})
        self._answers = list(answers)

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        on_completed: OnCompleted | None = None,
        is_enough: IsEnough = never_enough,
    ) -> list[list[Completion]]:
        return [self._answers for _ in requests]


def sample_first(engine: ScriptedEngine, *, num_groups: int) -> StartedGroup:
    """Return the first of some groups of one rollout, of which one is enough."""
    (problem,) = scripted_source(1).take(1)
    sampled = sample_started(
        engine,
        [StartedGroup(group_id="0/0", prefixed_problem=problem)] * num_groups,
        SamplingParams(
            temperature=1.0, max_completion_tokens=50, max_total_tokens=60, stop_token_ids=(9,)
        ),
        num_wanted=1,
        group_size=1,
        label="0",
        seed=0,
    )
    return sampled.groups[0]


@pytest.mark.parametrize(
    ("token_ids", "reason"),
    [
        pytest.param((1,) * 50, "length", id="full"),
        pytest.param((1,) * 49, "abort", id="one short of it"),
        pytest.param((1, 9), "stop", id="end token"),
    ],
)
def test_a_completion_aborted_after_its_last_token_is_finished(
    token_ids: tuple[int, ...], reason: str
) -> None:
    aborted = completion_of(
        token_ids=token_ids, logprobs=(-1.0,) * len(token_ids), finish_reason="abort"
    )
    group = sample_first(_Answering(aborted), num_groups=2)
    assert [one.finish_reason for one in group.completions] == [reason]


def test_an_engine_that_aborts_or_loses_without_being_asked_is_refused() -> None:
    aborted = completion_of(finish_reason="abort")
    for engine, message in (
        (_Answering(completion_of(), completion_of()), "asked scripted 1.0 for 1 .* got 2"),
        (_Answering(aborted), "aborted a completion without being asked"),
    ):
        with pytest.raises(RolloutError, match=message):
            sample_first(engine, num_groups=1)


@pytest.mark.parametrize(
    ("policy_version", "max_staleness"),
    [
        pytest.param(1, 0, id="stale"),
        pytest.param(-1, 5, id="of weights that do not exist yet"),
        pytest.param(7, 6, id="too stale"),
    ],
)
def test_a_rollout_of_other_weights_is_refused(policy_version: int, max_staleness: int) -> None:
    generator = scripted_generator(scripted_config(1), scripted_source(2), ScriptedEngine({}))
    groups = generate(generator, 3).groups
    assert staleness_metrics(groups, 0, max_staleness=0) == {
        "rollout/staleness_mean": 0.0,
        "rollout/staleness_max": 0.0,
    }
    with pytest.raises(RuntimeError, match=r"rollout 3/0/0: 4 of its tokens are of policy version"):
        staleness_metrics(groups, policy_version, max_staleness=max_staleness)
