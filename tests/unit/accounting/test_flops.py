"""FLOPs and tokens of a run, by hand."""

import json

import pytest

from prefixrl_mcore.accounting.flops import (
    FlopsMeter,
    sampling_flops,
    update_flops,
)
from prefixrl_mcore.records import (
    Completion,
    Group,
    PrefixedProblem,
    Problem,
    Rollout,
    ScoredRollout,
    Verdict,
)

PROBLEM = Problem(problem_id="p", text="x", answer="1")


def _group(num_prompt: int, num_prefix: int, completions: list[int], cached: int) -> Group:
    start = PrefixedProblem(
        prefixed_problem_id="p",
        problem=PROBLEM,
        prompt_token_ids=(1,) * num_prompt,
        prefix_token_ids=(2,) * num_prefix,
    )
    rollouts = tuple(
        ScoredRollout(
            rollout=Rollout(
                rollout_id=f"0/0/{index}",
                prefixed_problem=start,
                completion=Completion(
                    token_ids=(3,) * length,
                    logprobs=(-1.0,) * length,
                    finish_reason="stop",
                    policy_version=0,
                    num_cached_tokens=cached if index else 0,
                ),
            ),
            verdict=Verdict(reward=0.0, reason="wrong"),
        )
        for index, length in enumerate(completions)
    )
    return Group(prefixed_problem=start, rollouts=rollouts, advantages=(0.0,) * len(completions))


def test_rules_are_2nd_and_6nd() -> None:
    assert sampling_flops(100, 7) == 1400.0
    assert update_flops(100, 7) == 4200.0


def test_the_rule_reproduces_the_published_cost_of_rejection_sampling() -> None:
    # 8.03e9 parameters, 650,000 traces of 6,700 tokens: 0.70e20 FLOPs.
    assert sampling_flops(8_030_000_000, 650_000 * 6_700) == pytest.approx(0.70e20, rel=0.005)


def test_a_step_by_hand() -> None:
    # Group 1: context 10 + 5, completions 4 and 6, the second's context cached: 40 tokens.
    # Group 2: context 10, completions 3 and 3, nothing cached: 26 tokens.
    groups = [_group(10, 5, [4, 6], cached=14), _group(10, 0, [3, 3], cached=0)]
    meter = FlopsMeter(num_parameters=100, collect_flops=5e5)
    meter.charge_sampling(66, num_cached_tokens=14)
    meter.charge_update_on(groups, num_computed_tokens=96, has_reference=False)
    # 2 * 100 * 66 and 6 * 100 * 66: groups without any gradient are charged as well.
    assert meter.sampling_flops == 13_200.0
    assert meter.update_flops == 39_600.0
    assert meter.charged_tokens == 132
    # Sampling computes 66 - 14; the update ran 96 tokens, padding included.
    assert meter.computed_tokens == 52 + 96
    meter.charge_sft(50)
    assert meter.sft_flops == 30_000.0
    assert meter.metrics() == {
        "flops/total": 582_800.0,
        "flops/collect": 500_000.0,
        "flops/sft": 30_000.0,
        "flops/sampling": 13_200.0,
        "flops/update": 39_600.0,
        "flops/interrupted": 0.0,
        "flops/num_interrupted_generations": 0.0,
        "tokens/charged": 182.0,
        "tokens/computed": 198.0,
    }


def test_the_forward_pass_of_a_reference_is_a_third_of_the_update() -> None:
    meter = FlopsMeter(num_parameters=100)
    meter.charge_update_on(
        [_group(10, 5, [4, 6], cached=14)], num_computed_tokens=48, has_reference=True
    )
    assert meter.update_flops == 6 * 100 * 40 + 2 * 100 * 40
    assert (meter.charged_tokens, meter.computed_tokens) == (2 * 40, 2 * 48)


def test_what_is_interrupted_is_charged_beside_the_course_of_the_run() -> None:
    meter = FlopsMeter(num_parameters=100, collect_flops=5e5)
    meter.charge_sampling(60)
    before = meter.metrics()
    meter.charge_interrupted(40, num_cached_tokens=14)
    meter.charge_interrupted(2, num_cached_tokens=0)
    assert meter.course_flops == before["flops/total"]
    assert meter.metrics() == before | {
        "flops/total": before["flops/total"] + 2 * 100 * 42,
        "flops/interrupted": 2.0 * 100 * 42,
        "flops/num_interrupted_generations": 2.0,
        "tokens/charged": 102.0,
        "tokens/computed": 88.0,
    }


def test_the_state_survives_json() -> None:
    meter = FlopsMeter(num_parameters=100, collect_flops=5e5)
    meter.charge_sampling(60, num_cached_tokens=14)
    meter.charge_update(60, num_computed_tokens=80)
    meter.charge_sft(50, num_computed_tokens=64)
    meter.charge_interrupted(5, num_cached_tokens=3)
    restored = FlopsMeter(num_parameters=100, collect_flops=5e5)
    restored.load_state(json.loads(json.dumps(meter.state())))
    assert restored == meter
    assert restored.total_flops == meter.total_flops == 579_000.0


def test_a_state_of_another_model_or_store_is_refused() -> None:
    state = FlopsMeter(num_parameters=100, collect_flops=5e5).state()
    with pytest.raises(ValueError, match="num_parameters of the saved run is 100, of this run 101"):
        FlopsMeter(num_parameters=101, collect_flops=5e5).load_state(state)
    with pytest.raises(ValueError, match="collect_flops of the saved run is 500000"):
        FlopsMeter(num_parameters=100).load_state(state)
    with pytest.raises(ValueError, match="num_parameters must be at least 1, got 0"):
        FlopsMeter(num_parameters=0)
