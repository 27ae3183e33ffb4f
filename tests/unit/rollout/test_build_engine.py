import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.policy import LogitsDtype
from prefixrl_mcore.config.rollout import RolloutConfig, SGLangConfig, TransformersConfig
from prefixrl_mcore.rollout import build
from prefixrl_mcore.rollout.build import build_engine
from prefixrl_mcore.rollout.engine import EngineError, SampleRequest, SamplingParams
from prefixrl_mcore.rollout.transformers_engine import TransformersEngine
from tests.support.tiny_models import write_tiny_qwen3

FALLBACK = SimpleNamespace(name="fallback")
MISSING = SGLangConfig(python=Path("nowhere/bin/python"))


def test_without_sglang_the_fallback_says_why_and_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_qwen3(tmp_path / "model")

    with caplog.at_level(logging.WARNING):
        engine = build_engine(
            RolloutConfig(sglang=MISSING),
            folder,
            logits_dtype="float32",
            logs_folder=tmp_path,
            device="cpu",
        )

    assert isinstance(engine, TransformersEngine)
    (record,) = caplog.records
    assert "nowhere/bin/python does not exist; run `make setup-sglang`" in record.getMessage()
    record_file = json.loads((tmp_path / "engine.json").read_text())
    assert record_file["engine"] == engine.name
    assert "nowhere/bin/python does not exist" in record_file["fallback_reason"]


def test_without_sglang_a_machine_of_one_gpu_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(build, "TransformersEngine", lambda folder, config, **_: FALLBACK)

    def built(sglang: SGLangConfig) -> object:
        return build_engine(
            RolloutConfig(sglang=sglang),
            tmp_path,
            logits_dtype="float32",
            logs_folder=tmp_path,
            device="cuda",
            num_trainer_ranks=1,
        )

    assert built(MISSING) is FALLBACK
    write_tiny_qwen3(tmp_path)
    with pytest.raises(ConfigError, match=r"1 trainer ranks \+ 1 servers x TP 1 = 2 GPUs"):
        built(SGLangConfig(python=Path(sys.executable)))


def test_server_that_does_not_start_is_replaced_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_qwen3(tmp_path / "model")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho broken environment\nexit 1\n")
    python.chmod(0o755)
    config = RolloutConfig(sglang=SGLangConfig(python=python))

    with caplog.at_level(logging.WARNING):
        engine = build_engine(
            config, folder, logits_dtype="float32", logs_folder=tmp_path, device="cpu"
        )

    assert isinstance(engine, TransformersEngine)
    assert "broken environment" in caplog.text


def test_fewer_servers_than_are_needed_are_refused_before_one_is_started(tmp_path: Path) -> None:
    config = RolloutConfig(sglang=SGLangConfig(python=MISSING.python, num_servers=2, min_servers=3))
    with pytest.raises(ConfigError, match="got 3 > 2"):
        build_engine(config, tmp_path, logits_dtype="float32", logs_folder=tmp_path, device="cpu")
    assert not list(tmp_path.iterdir())


def test_sglang_asked_for_by_name_is_not_replaced(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path / "model")

    with pytest.raises(EngineError, match="make setup-sglang"):
        build_engine(
            RolloutConfig(engine="sglang", sglang=MISSING),
            folder,
            logits_dtype="float32",
            logs_folder=tmp_path,
            device="cpu",
        )


def test_transformers_asked_for_by_name_does_not_look_for_sglang(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_qwen3(tmp_path / "model")
    config = RolloutConfig(engine="transformers", sglang=MISSING)

    with caplog.at_level(logging.WARNING):
        engine = build_engine(
            config, folder, logits_dtype="float32", logs_folder=tmp_path, device="cpu"
        )

    assert isinstance(engine, TransformersEngine)
    assert not caplog.records


@pytest.mark.parametrize(("logits_dtype", "num_flags"), [("float32", 1), ("bfloat16", 0)])
def test_server_is_started_with_the_precision_of_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logits_dtype: LogitsDtype, num_flags: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    folder = write_tiny_qwen3(tmp_path / "model")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)

    with pytest.raises(EngineError, match="died while it started"):
        build_engine(
            RolloutConfig(engine="sglang", sglang=SGLangConfig(python=python)),
            folder,
            logits_dtype=logits_dtype,
            logs_folder=tmp_path,
            device="cuda",
        )

    command = (tmp_path / "sglang-0-1.log").read_text()
    assert command.count("--enable-fp32-lm-head") == num_flags


def test_fallback_has_the_precision_of_logits(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path)
    config = RolloutConfig(engine="transformers", transformers=TransformersConfig(dtype="bfloat16"))
    request = SampleRequest(request_id="r", context_token_ids=(5, 6, 7), num_samples=1, seed=0)
    params = SamplingParams(
        temperature=0.0, max_completion_tokens=4, max_total_tokens=50, stop_token_ids=()
    )

    logprobs = {
        build_engine(config, folder, logits_dtype=logits_dtype, logs_folder=tmp_path, device="cpu")
        .sample([request], params)[0][0]
        .logprobs
        for logits_dtype in ("float32", "bfloat16", "bfloat16")
    }

    assert len(logprobs) == 2
