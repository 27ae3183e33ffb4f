"""The engine of evaluations, collection and training is built with the run's settings."""

from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors import safe_open

from prefixrl_mcore.config.policy import LogitsDtype
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.eval.setup import build_evaluator
from prefixrl_mcore.rollout.engine import EngineError
from tests.support.fake_sglang import FakeSGLang, serve
from tests.support.tiny_models import write_tiny_qwen3


@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
def test_the_engine_has_the_precision_of_logits_that_the_run_sets(
    tmp_path: Path, logits_dtype: LogitsDtype
) -> None:
    folder = write_tiny_qwen3(tmp_path / "model")
    fake = FakeSGLang()
    fake.precision = {"dtype": "bfloat16", "enable_fp32_lm_head": False}
    with ExitStack() as stack:
        config = RunConfig.model_validate(
            {
                "run_folder": tmp_path / "run",
                "model": {"path": folder, "logits_dtype": logits_dtype},
                "data": {"problems": tmp_path / "p.jsonl"},
                "rollout": {
                    "engine": "sglang",
                    "sglang": {"urls": [stack.enter_context(serve(fake))]},
                },
                "reward": {"num_workers": 1},
            }
        )
        if logits_dtype == "float32":  # the server rounds
            stack.enter_context(pytest.raises(EngineError, match="rounded logits"))
        evaluator = stack.enter_context(
            build_evaluator(
                config,
                model_folder=folder,
                temperature=1.0,
                logs_folder=tmp_path,
                problems=[],
                is_synced=True,
            )
        )
        assert evaluator is not None


@pytest.mark.parametrize("is_synced", [False, True])
def test_servers_that_run_elsewhere_are_sent_the_weights_that_are_judged(
    tmp_path: Path, is_synced: bool
) -> None:
    folder = write_tiny_qwen3(tmp_path / "model")
    fake = FakeSGLang()
    with serve(fake) as url:
        config = RunConfig.model_validate(
            {
                "run_folder": tmp_path / "run",
                "model": {"path": folder},
                "data": {"problems": tmp_path / "p.jsonl"},
                "rollout": {"engine": "sglang", "sglang": {"urls": [url], "dtype": "float32"}},
                "reward": {"num_workers": 1},
            }
        )
        with build_evaluator(
            config,
            model_folder=folder,
            temperature=1.0,
            logs_folder=tmp_path,
            problems=[],
            is_synced=is_synced,
        ) as evaluator:
            assert evaluator.engine.policy_version == -1
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        shapes = {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    assert fake.loaded == ({} if is_synced else shapes)
