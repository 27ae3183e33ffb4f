import pytest
import torch

from prefixrl_mcore.rollout.engine import SampleRequest
from prefixrl_mcore.rollout.token_draws import TokenDraws, draw_tokens

CPU = torch.device("cpu")


def request_of(name: str, seed: int, num_samples: int = 3) -> SampleRequest:
    return SampleRequest(
        request_id=name, context_token_ids=(1,), num_samples=num_samples, seed=seed
    )


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 0), (0.09, 0), (0.11, 1), (0.49, 1), (0.51, 3), (0.999999, 3)],
)
def test_token_is_the_inverse_of_the_distribution_function(uniform: float, token: int) -> None:
    # Cumulative probabilities 0.1, 0.5, 0.5, 1.0: token 2 has none.
    logprobs_BV = torch.tensor([[0.1, 0.4, 0.0, 0.5]]).log()

    drawn = draw_tokens(logprobs_BV, torch.tensor([uniform], dtype=torch.float64))

    assert drawn.tolist() == [token]


def test_token_of_probability_zero_is_never_drawn() -> None:
    logprobs_BV = torch.tensor([[0.0, 0.5, 0.0, 0.5]]).log().expand(2, 4)

    drawn = draw_tokens(logprobs_BV, torch.tensor([0.0, 0.5], dtype=torch.float64))

    assert drawn.tolist() == [1, 3]


def test_tail_of_a_large_vocabulary_is_drawn_as_often_as_it_should_be() -> None:
    # 2^17 terms of 8e-10 each next to a large one: in float32 about 80 of them make one step.
    probabilities = torch.full((2**17,), 1e-4 / (2**17 - 1), dtype=torch.float64)
    probabilities[0] = 1 - 1e-4
    logprobs_BV = probabilities.log().float()[None]

    drawn = draw_tokens(logprobs_BV, torch.tensor([1 - 0.5e-4], dtype=torch.float64))

    assert abs(int(drawn) - 2**16) <= 2


def test_numbers_of_a_row_do_not_depend_on_what_else_is_in_the_batch() -> None:
    request, other = request_of("one", 7), request_of("other", 8)
    together = TokenDraws([(other, 0), (request, 0), (request, 1), (request, 2)], CPU)
    alone = TokenDraws([(request, 2)], CPU)

    for step in (0, 1, 63, 64, 200):
        assert together.uniforms_of_step(step)[3] == alone.uniforms_of_step(step)[0]


def test_numbers_of_a_step_do_not_depend_on_the_steps_before() -> None:
    stepwise = TokenDraws([(request_of("one", 7), 1)], CPU)
    directly = TokenDraws([(request_of("one", 7), 1)], CPU)

    numbers = [stepwise.uniforms_of_step(step)[0] for step in range(201)]

    assert directly.uniforms_of_step(200)[0] == numbers[200]


def test_rows_and_steps_have_different_numbers() -> None:
    draws = TokenDraws([(request_of("one", 7), index) for index in range(3)], CPU)

    numbers = {float(value) for step in range(130) for value in draws.uniforms_of_step(step)}

    assert len(numbers) == 3 * 130
