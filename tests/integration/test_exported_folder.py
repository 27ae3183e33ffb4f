"""A folder exported from a trained checkpoint, as engines load it from disk."""

from pathlib import Path

import pytest

from prefixrl_mcore.checkpoint.convert.offline import convert_to_hf
from prefixrl_mcore.checkpoint.save_load import save_checkpoint
from prefixrl_mcore.config.rollout import RolloutConfig, SGLangConfig
from prefixrl_mcore.rollout.build import build_engine
from prefixrl_mcore.rollout.engine import RolloutEngine, SampleRequest, SamplingParams
from tests.support.policies import build_policy, make_batch
from tests.support.sglang_environments import sglang_python
from tests.support.tiny_models import (
    build_tiny_llama,
    build_tiny_qwen2,
    build_tiny_qwen3,
    build_tiny_qwen3_moe,
    write_model_folder,
)

FAMILIES = {
    "qwen3": build_tiny_qwen3,
    "qwen3-moe": build_tiny_qwen3_moe,
    "llama-3": build_tiny_llama,
    "qwen2.5": build_tiny_qwen2,
}
CONTEXTS = ((5, 9, 14), (1, 30, 4, 4, 20, 7), tuple(range(4, 28)))


def start(name: str, model: Path, logs: Path, python: Path = Path()) -> RolloutEngine:
    config = RolloutConfig(
        engine="sglang" if name == "sglang" else "transformers",
        max_total_tokens=100,
        sglang=SGLangConfig(python=python, start_timeout_seconds=300, max_retries=2),
    )
    return build_engine(config, model, logits_dtype="float32", logs_folder=logs, device="cpu")


def greedy(engine: RolloutEngine) -> list[tuple[int, ...]]:
    requests = [
        SampleRequest(request_id=str(index), context_token_ids=context, num_samples=1, seed=0)
        for index, context in enumerate(CONTEXTS)
    ]
    params = SamplingParams(
        temperature=0.0, max_completion_tokens=20, max_total_tokens=100, stop_token_ids=()
    )
    return [group[0].token_ids for group in engine.sample(requests, params)]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3", "transformers"),
        *(
            pytest.param(family, "sglang", marks=pytest.mark.slow)
            for family in ("qwen3", "qwen3-moe", "llama-3", "qwen2.5")
        ),
    ],
)
def test_an_engine_says_of_the_exported_folder_what_it_says_of_the_live_policy(
    family: str, name: str, tmp_path: Path
) -> None:
    python = sglang_python() if name == "sglang" else Path()
    source = write_model_folder(FAMILIES[family](), tmp_path / "source")
    policy = build_policy(source)
    policy.update(make_batch())
    save_checkpoint(tmp_path / "run", 1, policy, {})
    convert_to_hf(tmp_path / "run", tmp_path / "out")

    live = start("transformers", source, tmp_path / "logs-live")
    before = greedy(live)
    live.load_weights(policy.export_weights, 1)
    expected = greedy(live)
    live.close()
    assert expected != before  # the update is seen

    exported = start(name, tmp_path / "out", tmp_path / "logs", python)
    try:
        assert exported.policy_version == -1  # nothing was sent: weights are those on disk
        assert greedy(exported) == expected
    finally:
        exported.close()
