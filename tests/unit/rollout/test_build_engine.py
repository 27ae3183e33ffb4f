import logging
from pathlib import Path

import pytest

from prefixrl_mcore.config.rollout import RolloutConfig, SGLangConfig
from prefixrl_mcore.rollout.build import build_engine
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.transformers_engine import TransformersEngine
from tests.support.tiny_models import write_tiny_qwen3

MISSING = SGLangConfig(python=Path("nowhere/bin/python"))


def test_without_sglang_the_fallback_says_why_and_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_qwen3(tmp_path / "model")

    with caplog.at_level(logging.WARNING):
        engine = build_engine(
            RolloutConfig(sglang=MISSING), folder, logs_folder=tmp_path, device="cpu"
        )

    assert isinstance(engine, TransformersEngine)
    (record,) = caplog.records
    assert "nowhere/bin/python does not exist; run `make setup-sglang`" in record.getMessage()


def test_server_that_does_not_start_is_replaced_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_qwen3(tmp_path / "model")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho broken environment\nexit 1\n")
    python.chmod(0o755)
    config = RolloutConfig(sglang=SGLangConfig(python=python))

    with caplog.at_level(logging.WARNING):
        engine = build_engine(config, folder, logs_folder=tmp_path, device="cpu")

    assert isinstance(engine, TransformersEngine)
    assert "broken environment" in caplog.text


def test_sglang_asked_for_by_name_is_not_replaced(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path / "model")

    with pytest.raises(EngineError, match="make setup-sglang"):
        build_engine(
            RolloutConfig(engine="sglang", sglang=MISSING),
            folder,
            logs_folder=tmp_path,
            device="cpu",
        )


def test_transformers_asked_for_by_name_does_not_look_for_sglang(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_qwen3(tmp_path / "model")
    config = RolloutConfig(engine="transformers", sglang=MISSING)

    with caplog.at_level(logging.WARNING):
        engine = build_engine(config, folder, logs_folder=tmp_path, device="cpu")

    assert isinstance(engine, TransformersEngine)
    assert not caplog.records
