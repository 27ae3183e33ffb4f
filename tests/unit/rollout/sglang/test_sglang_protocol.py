"""What a server says of itself becomes one record; versions out of range are named."""

import logging
import re

import pytest

from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.sglang.environment import ENVIRONMENT_FOLDER
from prefixrl_mcore.rollout.sglang.protocol import (
    NEWEST_VERSION,
    OLDEST_VERSION,
    ServerProtocol,
    read_protocol,
)
from tests.support.fake_sglang import FakeSGLang, serve


def protocol_of(version: str) -> ServerProtocol:
    return read_protocol({"version": version}, has_update_sessions=True, url="http://there")


def test_arguments_of_the_server_are_read_and_logged_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    info = {
        "version": "0.5.20",
        "enable_fp32_lm_head": True,
        "enable_deterministic_inference": True,
        "disable_radix_cache": True,
        "enable_memory_saver": False,
    }
    with caplog.at_level(logging.INFO):
        protocol = read_protocol(info, has_update_sessions=False, url="http://there")

    assert protocol == ServerProtocol(
        version="0.5.20",
        has_update_sessions=False,
        has_float32_head=True,
        is_deterministic=True,
        has_prefix_cache=False,
        can_release_memory=False,
    )
    assert [record.message for record in caplog.records] == [
        "SGLang 0.5.20: update sessions off, float32 head on, deterministic inference on, prefix "
        "cache off, memory release off (http://there)"
    ]


def test_prose_that_is_no_text_is_no_error_of_a_call_that_succeeded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeSGLang()
    monkeypatch.setattr(fake, "answer", lambda _path, _payload: (200, b"\xff"))
    with serve(fake) as url:
        SGLangClient(url, request_timeout_seconds=5).set_weight_version("new")


@pytest.mark.parametrize("version", ["0.5.16", "0.4.99", "0.5.9.post1"])
def test_version_that_is_too_old_is_refused_with_the_range(version: str) -> None:
    message = f"http://there is version {version}, .* {OLDEST_VERSION} to {NEWEST_VERSION}"

    with pytest.raises(EngineError, match=message):
        protocol_of(version)


@pytest.mark.parametrize("version", ["0.5.24", "0.6.0", "1.0.0rc1", "nightly"])
def test_version_that_no_test_has_run_on_is_a_warning(
    version: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert protocol_of(version).version == version

    assert re.search(f"is version {version}, which no test has run on", caplog.text)


@pytest.mark.parametrize("version", [OLDEST_VERSION, "0.5.18.post2", NEWEST_VERSION])
def test_version_in_the_range_is_no_warning(version: str, caplog: pytest.LogCaptureFixture) -> None:
    protocol_of(version)

    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


@pytest.mark.parametrize("has_sessions", [False, True])
def test_sessions_are_detected_without_opening_one(has_sessions: bool) -> None:
    fake = FakeSGLang(has_sessions=has_sessions)
    with serve(fake) as url:
        client = SGLangClient(url, request_timeout_seconds=5)
        protocol = client.detect_protocol(client.server_info())

        assert protocol.has_update_sessions == has_sessions
        assert not fake.is_session_open
        assert client.begin_update() == has_sessions
        assert fake.is_session_open == has_sessions


@pytest.mark.parametrize(
    ("lock", "version"),
    [
        ("requirements-cpu.lock", OLDEST_VERSION),
        ("requirements-gpu.lock", OLDEST_VERSION),
        ("requirements-cpu-next.lock", NEWEST_VERSION),
    ],
)
def test_range_is_what_is_locked(lock: str, version: str) -> None:
    lines = (ENVIRONMENT_FOLDER / lock).read_text().splitlines()

    assert f"sglang=={version} \\" in lines
