"""Seeds of samples, and what a deterministic server is started and asked with."""

import pytest

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.determinism import (
    check_determinism,
    deterministic_flags,
    sample_seeds,
)
from prefixrl_mcore.rollout.sglang.payloads import generate_payload


def test_seeds_of_the_samples_are_fixed_and_all_different() -> None:
    seeds = [seed for request in range(50) for seed in sample_seeds(request, 8)]

    assert len(set(seeds)) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    # They are part of what a run means: a change of them changes every deterministic run.
    assert sample_seeds(7, 2) == [4172191270341509114, 8203323606716338283]
    assert sample_seeds(7, 3)[:2] == sample_seeds(7, 2)


@pytest.mark.parametrize("seeds", [[11, 12, 13], [11]])
@pytest.mark.parametrize("is_routed", [True, False])
def test_each_sample_is_a_request_with_a_seed_of_its_own(seeds: list[int], is_routed: bool) -> None:
    payload = generate_payload(
        context_token_ids=[5, 6],
        num_samples=len(seeds),
        max_new_tokens=4,
        temperature=1.0,
        stop_token_ids=[2],
        request_id="r",
        seeds=seeds,
        is_routed=is_routed,
    )

    # Lists, also for one sample: SGLang takes no list of parameters for a single context.
    assert payload["input_ids"] == [[5, 6]] * len(seeds)
    parameters = payload["sampling_params"]
    assert [one["sampling_seed"] for one in parameters] == seeds
    assert {one["n"] for one in parameters} == {1}
    assert {one["max_new_tokens"] for one in parameters} == {4}


@pytest.mark.parametrize(
    ("device", "flags"),
    [
        (
            "cpu",
            [
                *("--enable-deterministic-inference", "--max-running-requests", "1"),
                "--disable-radix-cache",
            ],
        ),
        ("cuda", ["--enable-deterministic-inference"]),
    ],
)
def test_server_is_started_deterministic_where_it_is_asked_for(
    device: str, flags: list[str]
) -> None:
    assert deterministic_flags(SGLangConfig(), device=device) == []
    assert deterministic_flags(SGLangConfig(deterministic=True), device=device) == flags


def test_server_elsewhere_that_is_not_deterministic_is_refused() -> None:
    config = SGLangConfig(urls=("http://there",), deterministic=True)

    check_determinism({"enable_deterministic_inference": True}, config)
    with pytest.raises(EngineError, match="--enable-deterministic-inference, or leave"):
        check_determinism({"enable_deterministic_inference": False}, config)
