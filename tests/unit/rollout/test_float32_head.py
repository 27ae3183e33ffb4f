"""Logits of a bfloat16 model in the transformers engine: float32, or rounded on request."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefixrl_mcore.config.policy import LogitsDtype
from prefixrl_mcore.config.rollout import TransformersConfig
from prefixrl_mcore.records import Completion
from prefixrl_mcore.rollout.engine import SampleRequest, SamplingParams
from prefixrl_mcore.rollout.float32_head import Float32Head, use_float32_head
from prefixrl_mcore.rollout.transformers_engine import TransformersEngine
from tests.support.tiny_models import write_tiny_qwen3

# Float32 sums of the same bfloat16 products in another order.
LOGPROB_TOLERANCE = 1e-5

# Rounding moves a bfloat16 logit between 1 and 2 by up to 2**-8.
ROUNDING = 1e-3

CONTEXT = (5, 6, 7, 9, 4, 11)


def bfloat16_model(folder: Path, *, seed: int = 0, is_tied: bool = True) -> PreTrainedModel:
    """Write a tiny model to ``folder``; return it as loaded in bfloat16."""
    write_tiny_qwen3(folder, seed=seed, tie_word_embeddings=is_tied)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def engine_of(folder: Path, logits_dtype: LogitsDtype) -> TransformersEngine:
    config = TransformersConfig(dtype="bfloat16")
    return TransformersEngine(folder, config, logits_dtype=logits_dtype)


def first_tokens(engine: TransformersEngine) -> list[Completion]:
    request = SampleRequest(request_id="r", context_token_ids=CONTEXT, num_samples=64, seed=0)
    params = SamplingParams(
        temperature=0.7, max_completion_tokens=1, max_total_tokens=50, stop_token_ids=()
    )
    return engine.sample([request], params)[0]


@torch.no_grad()
def first_logprobs(model: PreTrainedModel, *, is_rounded: bool) -> Tensor:
    """Return [V] logprobs after ``CONTEXT``, from the model's own hidden states."""
    hidden_H = model.model(input_ids=torch.tensor([CONTEXT])).last_hidden_state[0, -1]
    logits_V = model.lm_head.weight.float() @ hidden_H.float()
    if is_rounded:
        logits_V = logits_V.bfloat16().float()
    return torch.log_softmax(logits_V / 0.7, dim=-1)


def max_gap(completions: list[Completion], logprobs_V: Tensor) -> float:
    return max(abs(one.logprobs[0] - float(logprobs_V[one.token_ids[0]])) for one in completions)


@pytest.mark.parametrize("is_tied", [True, False])
def test_logprobs_are_those_of_logits_that_were_never_rounded(
    tmp_path: Path, is_tied: bool
) -> None:
    model = bfloat16_model(tmp_path, is_tied=is_tied)

    completions = first_tokens(engine_of(tmp_path, "float32"))

    assert len({one.token_ids for one in completions}) > 5
    assert max_gap(completions, first_logprobs(model, is_rounded=False)) < LOGPROB_TOLERANCE
    assert max_gap(completions, first_logprobs(model, is_rounded=True)) > ROUNDING


def test_logits_are_rounded_on_request(tmp_path: Path) -> None:
    model = bfloat16_model(tmp_path)

    completions = first_tokens(engine_of(tmp_path, "bfloat16"))

    assert max_gap(completions, first_logprobs(model, is_rounded=True)) < LOGPROB_TOLERANCE


@pytest.mark.parametrize("is_tied", [True, False])
def test_loaded_weights_are_those_that_logits_come_from(tmp_path: Path, is_tied: bool) -> None:
    engine = engine_of(write_tiny_qwen3(tmp_path / "a", tie_word_embeddings=is_tied), "float32")
    first_tokens(engine)
    other = bfloat16_model(tmp_path / "b", seed=1, is_tied=is_tied)

    engine.load_weights(lambda: iter(other.state_dict().items()), 1)

    expected_V = first_logprobs(other, is_rounded=False)
    assert max_gap(first_tokens(engine), expected_V) < LOGPROB_TOLERANCE


def test_every_decoding_step_reports_float32_logits(tmp_path: Path) -> None:
    engine = engine_of(write_tiny_qwen3(tmp_path), "float32")
    logits_of_step: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        if isinstance(module, Float32Head):
            expected = inputs[0].float() @ module.weight.float().T
            assert inputs[0].dtype == module.weight.dtype == torch.bfloat16
            assert torch.allclose(logits, expected, rtol=0, atol=LOGPROB_TOLERANCE)
            logits_of_step.append(logits.reshape(-1))

    request = SampleRequest(request_id="r", context_token_ids=CONTEXT, num_samples=1, seed=0)
    params = SamplingParams(
        temperature=1.0, max_completion_tokens=8, max_total_tokens=50, stop_token_ids=()
    )
    with register_module_forward_hook(keep):
        ((completion,),) = engine.sample([request], params)

    expected_TV = torch.stack(logits_of_step).log_softmax(-1)
    expected_T = expected_TV.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    assert completion.logprobs == pytest.approx(expected_T.tolist(), abs=LOGPROB_TOLERANCE)


def test_float32_model_is_the_same_under_either_setting(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path)
    config = TransformersConfig()

    kept = first_tokens(TransformersEngine(folder, config, logits_dtype="float32"))
    rounded = first_tokens(TransformersEngine(folder, config, logits_dtype="bfloat16"))

    assert kept == rounded


@torch.no_grad()
def test_bias_and_leading_dimensions_are_kept(tmp_path: Path) -> None:
    model = bfloat16_model(tmp_path, is_tied=False)
    linear = nn.Linear(64, 32).bfloat16()
    model.set_output_embeddings(linear)
    use_float32_head(model)
    head = model.get_output_embeddings()
    assert isinstance(head, Float32Head)
    hidden_BSH = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()

    logits_BSV = head(hidden_BSH)

    expected_BSV = hidden_BSH.float() @ linear.weight.float().T + linear.bias.float()
    assert logits_BSV.dtype == torch.float32
    assert torch.allclose(logits_BSV, expected_BSV, rtol=0, atol=1e-6)
    assert head.weight is linear.weight
    assert head.bias is linear.bias


def test_output_layer_that_is_not_plain_is_refused(tmp_path: Path) -> None:
    class Scaled(nn.Linear):
        pass

    model = bfloat16_model(tmp_path, is_tied=False)
    model.set_output_embeddings(Scaled(64, 32))

    with pytest.raises(
        ValueError, match=r'got Scaled; set rollout\.transformers\.dtype = "float32"'
    ):
        use_float32_head(model)
