import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefixrl_mcore.config.rollout import TransformersConfig
from prefixrl_mcore.records import Completion
from prefixrl_mcore.rollout import decoding
from prefixrl_mcore.rollout.engine import EngineError, SampleRequest, SamplingParams
from prefixrl_mcore.rollout.transformers_engine import TransformersEngine
from tests.support.hf_logprobs import hf_completion_logprobs
from tests.support.tiny_models import (
    EOS_ID,
    VOCABULARY,
    build_tiny_qwen3,
    build_tiny_qwen3_moe,
    write_model_folder,
    write_tiny_qwen3,
)

# Float32 on both sides; the order of sums differs.
LOGPROB_TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model"))


def engine_of(folder: Path, max_batch_size: int = 256) -> TransformersEngine:
    config = TransformersConfig(max_batch_size=max_batch_size)
    return TransformersEngine(folder, config, logits_dtype="float32")


def request_of(seed: int, length: int, num_samples: int) -> SampleRequest:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randint(4, len(VOCABULARY), (length,), generator=generator)
    return SampleRequest(
        request_id=str(seed),
        context_token_ids=tuple(context.tolist()),
        num_samples=num_samples,
        seed=seed,
    )


def params_of(max_completion_tokens: int = 30, stop: tuple[int, ...] = (EOS_ID,)) -> SamplingParams:
    return SamplingParams(
        temperature=1.0,
        max_completion_tokens=max_completion_tokens,
        max_total_tokens=2000,
        stop_token_ids=stop,
    )


def token_ids_of(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[one.token_ids for one in group] for group in groups]


def test_completions_do_not_depend_on_the_batch(model_folder: Path) -> None:
    requests = [request_of(seed, 5 + 7 * seed, 3) for seed in range(5)]
    whole = engine_of(model_folder).sample(requests, params_of())

    in_pairs = engine_of(model_folder, max_batch_size=2).sample(requests, params_of())
    reversed_ = engine_of(model_folder).sample(requests[::-1], params_of())
    alone = [engine_of(model_folder).sample([request], params_of())[0] for request in requests]

    assert token_ids_of(in_pairs) == token_ids_of(whole)
    assert token_ids_of(reversed_[::-1]) == token_ids_of(whole)
    assert token_ids_of(alone) == token_ids_of(whole)


def test_another_seed_gives_other_completions(model_folder: Path) -> None:
    request = request_of(0, 6, 2)
    other = SampleRequest(
        request_id="other", context_token_ids=request.context_token_ids, num_samples=2, seed=99
    )

    first, second = engine_of(model_folder).sample([request, other], params_of())

    assert not {one.token_ids for one in first} & {one.token_ids for one in second}


def test_long_completions_outgrow_the_first_buffers(model_folder: Path) -> None:
    # More steps than the cache (256) and the token table (64) have room for at first, with rows
    # that leave the batch before and after the cache has grown.
    requests = [request_of(0, 40, 3), request_of(1, 1650, 1), request_of(2, 1900, 2)]

    groups = engine_of(model_folder).sample(requests, params_of(600, stop=()))

    assert [len(one.token_ids) for group in groups for one in group] == [600] * 3 + [350, 100, 100]
    for asked, group in zip(requests, groups, strict=True):
        expected = hf_completion_logprobs(
            build_tiny_qwen3(), asked.context_token_ids, group[-1].token_ids, temperature=1.0
        )
        assert group[-1].logprobs == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


def test_contexts_beyond_one_forward_pass_are_computed_in_parts(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request_of(seed, 20 + seed, 2) for seed in range(6)]
    whole = engine_of(model_folder).sample(requests, params_of())

    monkeypatch.setattr(decoding, "_PREFILL_TOKENS", 50)
    in_parts = engine_of(model_folder).sample(requests, params_of())

    assert token_ids_of(in_parts) == token_ids_of(whole)


def test_first_tokens_follow_the_models_distribution(model_folder: Path) -> None:
    request = request_of(3, 4, 2000)
    engine = engine_of(model_folder, max_batch_size=2000)

    (group,) = engine.sample([request], params_of(1, stop=()))

    counts: dict[int, int] = {}
    for one in group:
        counts[one.token_ids[0]] = counts.get(one.token_ids[0], 0) + 1
    for token, count in counts.items():
        probability = math.exp(next(o.logprobs[0] for o in group if o.token_ids[0] == token))
        # Five standard deviations of a binomial count.
        slack = 5 * math.sqrt(2000 * probability * (1 - probability)) + 1
        assert abs(count - 2000 * probability) < slack


def test_only_the_first_sample_computes_the_context(model_folder: Path) -> None:
    (group,) = engine_of(model_folder).sample([request_of(0, 9, 4)], params_of())

    assert [one.num_cached_tokens for one in group] == [0, 9, 9, 9]


def test_failed_load_leaves_an_engine_that_refuses_to_sample(model_folder: Path) -> None:
    engine = engine_of(model_folder)
    weights = [(n, w.detach()) for n, w in build_tiny_qwen3(seed=1).named_parameters()]

    with pytest.raises(EngineError, match="did not come"):
        engine.load_weights(lambda: iter(weights[:-1]), 1)

    with pytest.raises(EngineError, match="incomplete"):
        engine.sample([request_of(0, 5, 1)], params_of())
    engine.load_weights(lambda: iter(weights), 1)
    assert len(engine.sample([request_of(0, 5, 1)], params_of())) == 1


def test_untied_head_is_loaded_and_required(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path, tie_word_embeddings=False)
    other = build_tiny_qwen3(seed=1, tie_word_embeddings=False)
    weights = [(name, weight.detach()) for name, weight in other.named_parameters()]
    engine = engine_of(folder)
    with pytest.raises(EngineError, match=r"did not come: lm_head\.weight"):
        engine.load_weights(
            lambda: iter([pair for pair in weights if pair[0] != "lm_head.weight"]), 1
        )

    engine.load_weights(lambda: iter(weights), 2)
    request = request_of(0, 8, 1)
    ((completion,),) = engine.sample([request], params_of())

    expected = hf_completion_logprobs(
        other, request.context_token_ids, completion.token_ids, temperature=1.0
    )
    assert completion.logprobs == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


def test_experts_are_loaded_by_their_names_in_files(tmp_path: Path) -> None:
    write_model_folder(build_tiny_qwen3_moe(seed=0), tmp_path / "old")
    new = write_model_folder(build_tiny_qwen3_moe(seed=1), tmp_path / "new")
    engine = engine_of(tmp_path / "old")
    weights = load_file(new / "model.safetensors")
    engine.load_weights(lambda: iter(weights.items()), 1)
    request = request_of(0, 6, 2)
    sampled = token_ids_of(engine.sample([request], params_of()))
    assert sampled == token_ids_of(engine_of(new).sample([request], params_of()))
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(EngineError, match=r"experts\.3\.up_proj"):
        engine.load_weights(lambda: iter(weights.items()), 2)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no config\.json"):
        engine_of(tmp_path)


def test_two_requests_of_one_id_are_refused(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="two requests have this id"):
        engine_of(model_folder).sample([request_of(0, 5, 1), request_of(0, 5, 1)], params_of())
