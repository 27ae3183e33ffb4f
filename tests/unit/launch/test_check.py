"""``prefixrl check``: arithmetic against hand-worked sizes, and refusals."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.launch.check import (
    MemoryEstimate,
    check_layout,
    estimate_memory,
    print_check,
    read_model_size,
)

QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
}


def _config(
    folder: Path,
    parallel: dict[str, Any] | None = None,
    *,
    model: dict[str, Any] | None = None,
    policy: dict[str, Any] | None = None,
    stream_tokens: int = 4096,
    method: str = "prefixrl",
) -> RunConfig:
    """Return a run of Qwen3-4B with changes to its ``config.json`` (``model``)."""
    (folder / "config.json").write_text(json.dumps(QWEN3_4B | (model or {})))
    return RunConfig.model_validate(
        {
            "run_folder": folder / "run",
            "method": method,
            "model": {"path": folder},
            "data": {"problems": folder / "p.jsonl"},
            "rollout": {"max_total_tokens": stream_tokens, "max_completion_tokens": 1},
            "policy": {"parallel": parallel or {}} | (policy or {}),
        }
    )


def _memory(folder: Path, parallel: dict[str, Any] | None = None, **changes: Any) -> MemoryEstimate:
    config = _config(folder, parallel, **changes)
    return estimate_memory(config, read_model_size(folder))


def _refusal(folder: Path, parallel: dict[str, Any] | None = None, **changes: Any) -> str:
    config = _config(folder, parallel, **changes)
    with pytest.raises(ConfigError) as refusal:
        print_check(config, Console(file=io.StringIO()))
    return str(refusal.value)


def test_parameters_of_qwen3_4b(tmp_path: Path) -> None:
    size = read_model_size(_config(tmp_path).model.path)
    # attention 2 x 2560 x 128 x (32 + 8), feed-forward 3 x 2560 x 9728, embedding 151936 x 2560
    assert size.num_parameters == 36 * (26_214_400 + 74_711_040) + 388_956_160 == 4_022_272_000


def test_tensor_parallelism_divides_weights_gradients_and_optimizer(tmp_path: Path) -> None:
    one = _memory(tmp_path)
    two = _memory(tmp_path, {"tensor_model_parallel_size": 2})
    assert one.weights == 2 * 4_022_272_000
    assert one.gradients == 4 * 4_022_272_000
    assert one.optimizer == 12 * 4_022_272_000
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(two, part) == getattr(one, part) / 2


def test_float32_needs_no_main_weight(tmp_path: Path) -> None:
    memory = _memory(tmp_path, policy={"dtype": "float32"})
    assert memory.weights == 4 * 4_022_272_000
    assert memory.optimizer == 8 * 4_022_272_000


def test_a_distributed_optimizer_is_sharded_over_replicas_gradients_are_not(tmp_path: Path) -> None:
    parallel = {"data_parallel_size": 4}
    sharded = _memory(tmp_path, parallel, policy={"optimizer": {"use_distributed_optimizer": True}})
    assert sharded.optimizer == 12_066_816_000  # 12 x 4 022 272 000 / 4
    assert sharded.gradients == 16_089_088_000
    assert _memory(tmp_path, parallel).optimizer == 48_267_264_000


@pytest.mark.parametrize(
    ("parallel", "stream_tokens", "num_bytes"),
    [
        # 2**28 // (4 x 151936) = 441 rows: 2 x 441 x 607744; weight gradient 607744 x 2560
        pytest.param({}, 4096, 536_030_208 + 1_555_824_640, id="chunk"),
        # half the vocabulary: 883 rows x 303872 bytes, twice; 303872 x 2560
        pytest.param(
            {"tensor_model_parallel_size": 2}, 4096, 536_637_952 + 777_912_320, id="tensor-parallel"
        ),
        pytest.param({}, 100, 121_548_800 + 1_555_824_640, id="short-stream"),
    ],
)
def test_the_head_holds_a_chunk_twice_and_a_weight_gradient(
    tmp_path: Path, parallel: dict[str, Any], stream_tokens: int, num_bytes: int
) -> None:
    assert _memory(tmp_path, parallel, stream_tokens=stream_tokens).head == num_bytes


@pytest.mark.parametrize(
    ("parallel", "policy", "num_bytes"),
    [
        # 4096 tokens x 2560 = 10 485 760 elements; x 34 x 36 layers
        pytest.param({}, {}, 12_834_570_240, id="bfloat16"),
        pytest.param({}, {"dtype": "float32"}, 25_669_140_480, id="float32"),
        pytest.param({"tensor_model_parallel_size": 2}, {}, 6_417_285_120, id="tensor-parallel"),
        # 36 / 12 layers of 12 microbatches
        pytest.param({"pipeline_model_parallel_size": 12}, {}, 12_834_570_240, id="pipeline"),
        # 10 485 760 x 2 bytes x 36 layers
        pytest.param({}, {"recompute": "full"}, 754_974_720, id="recompute"),
        pytest.param(
            {},
            {"recompute": "full", "dtype": "float32"},
            1_509_949_440,
            id="recompute-float32",
        ),
        pytest.param(
            {"tensor_model_parallel_size": 2},
            {"recompute": "full"},
            754_974_720,
            id="recompute-tensor-parallel",
        ),
        pytest.param(
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            {"recompute": "full"},
            377_487_360,
            id="recompute-sequence-parallel",
        ),
    ],
)
def test_activations_of_a_stream_of_4096_tokens(
    tmp_path: Path, parallel: dict[str, Any], policy: dict[str, Any], num_bytes: int
) -> None:
    assert _memory(tmp_path, parallel, policy=policy).activations == num_bytes


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 36},
            "36 of 36 layers leave 0 for 1 of 2 pipeline stages",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 5,
                "virtual_pipeline_model_parallel_size": 2,
            },
            "[5] layers of the first and last stage do not divide into 2 chunks each",
        ),
        (
            {"expert_model_parallel_size": 2, "data_parallel_size": 2},
            "needs a mixture-of-experts model, got Qwen3ForCausalLM",
        ),
        ({"expert_model_parallel_size": 2}, "does not divide the 1 ranks of a pipeline stage"),
        ({"virtual_pipeline_model_parallel_size": 2}, "needs pipeline_model_parallel_size > 1"),
        ({"tensor_model_parallel_size": 3}, "32 attention heads do not divide into 3"),
        ({"tensor_model_parallel_size": 16}, "8 key-value heads do not divide into 16"),
        ({"pipeline_model_parallel_size": 5}, "36 layers do not divide into 5"),
    ],
    ids=[
        "uneven",
        "uneven-chunks",
        "expert",
        "stage",
        "virtual",
        "heads",
        "key-value-heads",
        "layers",
    ],
)
def test_a_layout_that_training_refuses_is_refused(
    tmp_path: Path, parallel: dict[str, Any], message: str
) -> None:
    assert message in _refusal(tmp_path, parallel)


MIXTURE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}


def test_parameters_of_a_mixture_of_experts(tmp_path: Path) -> None:
    size = read_model_size(_config(tmp_path, model=MIXTURE).model.path)
    # One expert 3 x 2560 x 768, router 64 x 2560, attention and embedding as in Qwen3-4B.
    experts = 36 * 64 * 5_898_240
    assert size.num_expert_parameters == experts
    assert size.num_parameters == 36 * (26_214_400 + 163_840) + experts + 388_956_160
    assert size.num_active_parameters == size.num_parameters - experts * 7 // 8


def test_expert_parallel_ranks_share_the_experts(tmp_path: Path) -> None:
    replicas = {"data_parallel_size": 4}
    spread = replicas | {"expert_model_parallel_size": 4}
    sharded = {"optimizer": {"use_distributed_optimizer": True}}
    one = _memory(tmp_path, replicas, model=MIXTURE, policy=sharded)
    four = _memory(tmp_path, spread, model=MIXTURE, policy=sharded)
    experts = 36 * 64 * 5_898_240
    assert one.weights - four.weights == 2 * experts * 3 / 4
    assert one.optimizer == four.optimizer  # sharded over all ranks either way
    cut = replicas | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    assert _memory(tmp_path, cut, model=MIXTURE, policy=sharded) == four


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"expert_model_parallel_size": 3, "data_parallel_size": 3}, "64 experts do not divide"),
        ({"tensor_model_parallel_size": 2}, "sequence_parallel must be true for a mixture"),
        (
            {"expert_tensor_parallel_size": 5, "data_parallel_size": 5},
            "expert_tensor_parallel_size: 768 feed-forward width do not divide into 5",
        ),
    ],
    ids=["experts", "sequence-parallel", "width"],
)
def test_a_layout_that_experts_cannot_have_is_refused(
    tmp_path: Path, parallel: dict[str, Any], message: str
) -> None:
    assert message in _refusal(tmp_path, parallel, model=MIXTURE)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            MIXTURE | {"moe_intermediate_size": 772},
            "multiples of 8 in bfloat16, got hidden_size 2560 and moe_intermediate_size 772 / "
            "expert_tensor_parallel_size 1 = 772; use 'sequential'",
        ),
        ({}, "policy.experts needs a mixture-of-experts model, got Qwen3ForCausalLM"),
    ],
    ids=["rows", "dense"],
)
def test_grouped_experts_that_cannot_be_are_refused(
    tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    grouped = {"experts": {"implementation": "grouped"}}
    assert message in _refusal(tmp_path, model=model, policy=grouped)


def test_a_feed_forward_width_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    message = _refusal(
        tmp_path, {"tensor_model_parallel_size": 8}, model={"intermediate_size": 9732}
    )
    assert "9732 feed-forward width do not divide into 8" in message


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
            "['GemmaForCausalLM'] is not supported; expected one of ['LlamaForCausalLM',",
        ),
        ({"model_type": "llama"}, "model_type = 'llama' is not implemented"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
    ids=["architecture", "model-type", "rope", "missing"],
)
def test_a_model_that_training_refuses_is_refused(
    tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    assert message in _refusal(tmp_path, model=model)


def test_a_stream_that_sequence_parallelism_cannot_split_is_refused_with_stages(
    tmp_path: Path,
) -> None:
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    message = _refusal(tmp_path, parallel | {"pipeline_model_parallel_size": 2}, stream_tokens=4097)
    assert "stream of 4097 tokens does not divide into 2 equal parts (tensor 2" in message
    assert "set batch.stream_tokens to 4098 or 4096" in message
    one_stage = _config(tmp_path, parallel, stream_tokens=4097)
    check_layout(one_stage, read_model_size(tmp_path).shape)


@pytest.mark.parametrize(
    ("parallel", "tokens", "message"),
    [
        pytest.param(
            *({"context_parallel_size": 2}, 4098),
            "does not divide into 4 equal parts (2 chunks x context 2); set batch.stream_tokens to "
            "4100 or 4096",
            id="cp2",
        ),
        pytest.param(
            {
                "context_parallel_size": 2,
                "tensor_model_parallel_size": 4,
                "sequence_parallel": True,
            },
            4100,
            "does not divide into 8 equal parts (context 2 x least common multiple of 2 chunks and "
            "tensor 4); set batch.stream_tokens to 4104 or 4096",
            id="cp2-tp4-sp",
        ),
    ],
)
def test_a_stream_that_context_parallelism_cannot_cut_is_refused_with_the_arithmetic(
    tmp_path: Path, parallel: dict[str, Any], tokens: int, message: str
) -> None:
    assert message in _refusal(tmp_path, parallel, stream_tokens=tokens)
    fits = _config(tmp_path, parallel, stream_tokens=4104)
    check_layout(fits, read_model_size(tmp_path).shape)


def test_context_parallel_ranks_share_activations_and_the_sharded_optimizer(
    tmp_path: Path,
) -> None:
    whole = _memory(tmp_path, {}, policy={"optimizer": {"use_distributed_optimizer": True}})
    shared = _memory(
        tmp_path,
        {"context_parallel_size": 4},
        policy={"optimizer": {"use_distributed_optimizer": True}},
    )
    assert shared.activations == whole.activations / 4
    assert shared.optimizer == whole.optimizer / 4
    assert (shared.weights, shared.gradients) == (whole.weights, whole.gradients)


def test_sequences_longer_than_the_model_has_positions_are_refused(tmp_path: Path) -> None:
    message = _refusal(tmp_path, stream_tokens=40961)
    assert "rollout.max_total_tokens = 40961" in message
    assert "max_position_embeddings = 40960" in message
    fits = _config(tmp_path, stream_tokens=40960)
    check_layout(fits, read_model_size(tmp_path).shape)


def test_the_table_says_what_would_run(tmp_path: Path) -> None:
    out = io.StringIO()
    print_check(_config(tmp_path), Console(file=out, width=200))
    assert "128 prompts x 8 rollouts = 1024" in out.getvalue()
    assert "3 per trace at 40%-80%" in out.getvalue()


@pytest.mark.parametrize(
    ("dtype", "logits_dtype", "line"),
    [
        ("bfloat16", "float32", "policy bfloat16, logits float32 in trainer and engine"),
        ("bfloat16", "bfloat16", "policy bfloat16, logits bfloat16 in trainer and engine"),
        ("float32", "bfloat16", "policy float32, logits float32 in trainer and engine"),
    ],
)
def test_the_table_says_how_precise_logits_are(
    tmp_path: Path, dtype: str, logits_dtype: str, line: str
) -> None:
    settings = _config(tmp_path).model_dump()
    settings["model"]["logits_dtype"] = logits_dtype
    settings["policy"]["dtype"] = dtype
    settings["rollout"] |= {"sglang": {"dtype": dtype}, "transformers": {"dtype": dtype}}
    out = io.StringIO()
    print_check(RunConfig.model_validate(settings), Console(file=out, width=200))
    assert line in out.getvalue()


@pytest.mark.parametrize(
    ("method", "missing"),
    [("rl", set()), ("sft_then_rl", {"traces"}), ("prefixrl", {"traces", "prefixes"})],
    ids=["rl", "sft_then_rl", "prefixrl"],
)
def test_inputs_that_are_not_there_yet_are_named(
    tmp_path: Path, method: str, missing: set[str]
) -> None:
    out = io.StringIO()
    print_check(_config(tmp_path, method=method), Console(file=out, width=1000))
    listed = out.getvalue().rpartition("not there yet: ")[2].strip().split(", ")
    folders = {str(tmp_path / "run" / name) for name in missing}
    assert set(listed) == {str(tmp_path / "p.jsonl")} | folders
