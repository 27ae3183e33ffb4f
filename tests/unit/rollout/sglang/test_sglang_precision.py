"""The precision of a server's logits: its arguments, and what is refused."""

import re
import threading
from pathlib import Path
from typing import Any, Literal

import pytest

from prefixrl_mcore.config.policy import LogitsDtype
from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.engine import SGLangEngine
from prefixrl_mcore.rollout.sglang.launch import ServerLaunch
from prefixrl_mcore.rollout.sglang.precision import check_logits
from prefixrl_mcore.rollout.sglang.server import SGLangServer
from tests.support.fake_sglang import FakeSGLang, serve
from tests.support.tiny_models import write_tiny_qwen3

FLAG = "--enable-fp32-lm-head"

Dtype = Literal["float32", "bfloat16"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model"))


def failed_start(
    model_folder: Path,
    tmp_path: Path,
    *,
    says: str = "no such module: sglang",
    dtype: Dtype = "bfloat16",
    logits_dtype: LogitsDtype = "float32",
    device: str = "cuda",
) -> tuple[list[str], str]:
    """Return the command of a server that dies with the words ``says``, and the error."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 2\n")
    python.chmod(0o755)
    log_file = tmp_path / "sglang.log"
    with pytest.raises(EngineError) as error:
        SGLangServer.start(
            ServerLaunch(
                name="server 0",
                model_folder=model_folder,
                config=SGLangConfig(python=python, dtype=dtype),
                logits_dtype=logits_dtype,
                device=device,
                gpus=(),
                max_total_tokens=100,
                weight_version="w",
            ),
            log_file,
            cancelled=threading.Event(),
        )
    return log_file.read_text().splitlines()[0].split(), str(error.value)


@pytest.mark.parametrize(
    ("device", "dtype", "logits_dtype", "served_dtype", "has_flag"),
    [
        ("cuda", "bfloat16", "float32", "bfloat16", True),
        ("cuda", "bfloat16", "bfloat16", "bfloat16", False),
        ("cuda", "float32", "float32", "float32", False),
        ("cuda", "float32", "bfloat16", "float32", False),
        ("cpu", "bfloat16", "float32", "float32", False),
        ("cpu", "bfloat16", "bfloat16", "float32", False),
        ("cpu", "float32", "float32", "float32", False),
        ("cpu", "float32", "bfloat16", "float32", False),
    ],
)
def test_server_is_told_to_keep_float32_logits_of_bfloat16_weights(
    model_folder: Path,
    tmp_path: Path,
    device: str,
    dtype: Dtype,
    logits_dtype: LogitsDtype,
    served_dtype: str,
    has_flag: bool,
) -> None:
    command, _ = failed_start(
        model_folder, tmp_path, dtype=dtype, logits_dtype=logits_dtype, device=device
    )

    assert command[command.index("--dtype") + 1] == served_dtype
    assert command.count(FLAG) == has_flag


def test_server_without_the_flag_is_named_as_the_cause(model_folder: Path, tmp_path: Path) -> None:
    _, error = failed_start(
        model_folder, tmp_path, says=f"launch_server.py: error: unrecognized arguments: {FLAG}"
    )

    assert f"this version of SGLang has no {FLAG}" in error
    assert "run `make setup-sglang`" in error
    assert 'model.logits_dtype = "bfloat16"' in error


def test_server_that_died_otherwise_is_not_blamed_on_the_flag(
    model_folder: Path, tmp_path: Path
) -> None:
    command, error = failed_start(
        model_folder, tmp_path, says="error: unrecognized arguments: --sleep-on-idle"
    )

    assert FLAG in command
    assert "this version of SGLang" not in error


@pytest.mark.parametrize(
    ("served", "dtype", "logits_dtype"),
    [
        ({"dtype": "bfloat16", "enable_fp32_lm_head": True}, "bfloat16", "float32"),
        ({"dtype": "bfloat16", "enable_fp32_lm_head": False}, "bfloat16", "bfloat16"),
        ({"dtype": "float32", "enable_fp32_lm_head": False}, "bfloat16", "float32"),
        ({"dtype": "float32", "enable_fp32_lm_head": False}, "float32", "bfloat16"),
        ({"dtype": "auto", "enable_fp32_lm_head": False}, "float32", "float32"),
        ({"dtype": "auto"}, "bfloat16", "bfloat16"),
    ],
)
def test_server_with_the_trainers_logits_is_accepted(
    served: dict[str, Any], dtype: Dtype, logits_dtype: LogitsDtype
) -> None:
    check_logits(served, SGLangConfig(dtype=dtype), logits_dtype)


@pytest.mark.parametrize(
    ("served", "logits_dtype", "message"),
    [
        pytest.param(
            {"dtype": "bfloat16", "enable_fp32_lm_head": False},
            "float32",
            rf"has rounded logits .*{FLAG} off.* start it with {FLAG}",
            id="flag missing",
        ),
        pytest.param({"dtype": "auto"}, "float32", "has rounded logits", id="version without it"),
        pytest.param(
            {"dtype": "bfloat16", "enable_fp32_lm_head": True},
            "bfloat16",
            rf"has float32 logits .*{FLAG} on.* start it .*without {FLAG}",
            id="flag too many",
        ),
        pytest.param(
            {"dtype": "float32", "enable_fp32_lm_head": False},
            "bfloat16",
            r"has float32 logits \(dtype float32.*on a CPU cannot",
            id="float32 weights",
        ),
        pytest.param(
            {"dtype": "bfloat16", "enable_fp32_lm_head": True, "rl_on_policy_target": "fsdp"},
            "float32",
            "has rounded logits .*rl_on_policy_target fsdp",
            id="rounds after all",
        ),
        pytest.param(
            {"dtype": "float32", "enable_tf32_matmul": True},
            "float32",
            "has rounded logits .*enable_tf32_matmul on.*without .*--enable-tf32-matmul",
            id="rounds what it multiplies",
        ),
    ],
)
def test_server_with_other_logits_than_the_trainers_is_refused(
    served: dict[str, Any], logits_dtype: LogitsDtype, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        check_logits(served, SGLangConfig(dtype="bfloat16"), logits_dtype)


def test_engine_does_not_connect_to_a_server_that_rounds(
    model_folder: Path, tmp_path: Path
) -> None:
    fake = FakeSGLang()
    fake.precision = {"dtype": "bfloat16", "enable_fp32_lm_head": False}

    with serve(fake) as url, pytest.raises(EngineError, match=re.escape(f"start it with {FLAG}")):
        SGLangEngine(
            model_folder,
            SGLangConfig(urls=(url,), start_timeout_seconds=60),
            logits_dtype="float32",
            max_total_tokens=100,
            logs_folder=tmp_path,
        )
