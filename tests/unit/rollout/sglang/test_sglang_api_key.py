"""Where an API key comes from, when there must be one, and that it does not show."""

from pathlib import Path

import pytest

from prefixrl_mcore.cli import main
from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.api_key import (
    API_KEY_VARIABLE,
    ApiKey,
    address_of,
    find_api_key,
    is_loopback,
)
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from tests.support.fake_sglang import FakeSGLang, serve

KEY = "0123456789abcdef-secret"


def key_file(folder: Path, text: str = f"{KEY}\n", mode: int = 0o600) -> Path:
    path = folder / "key"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_server_for_this_machine_only_needs_no_key() -> None:
    assert SGLangConfig().host == "127.0.0.1"
    assert find_api_key(SGLangConfig()) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "node-17"])
def test_server_for_other_machines_needs_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f'host = "{host}".*{API_KEY_VARIABLE} or .*api_key_file'):
        find_api_key(SGLangConfig(host=host))

    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    assert find_api_key(SGLangConfig(host=host)) == ApiKey(KEY)


def test_file_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "another-key-altogether")

    assert find_api_key(SGLangConfig(api_key_file=key_file(tmp_path))) == ApiKey(KEY)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("short", id="short"),
        pytest.param("0123456789abcdef 0123456789abcdef", id="space"),
        pytest.param("0123456789abcdef\nX-Header: 1", id="two lines"),
        pytest.param("0123456789abcdef-schl\u00fcssel", id="not ASCII"),
    ],
)
def test_what_is_no_key_is_refused_without_showing_it(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least 16 printable ASCII") as error:
        find_api_key(SGLangConfig(api_key_file=key_file(tmp_path, text)))

    assert not text or text not in str(error.value)


def test_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"api_key_file .*missing.* FileNotFoundError"):
        find_api_key(SGLangConfig(api_key_file=tmp_path / "missing"))


def test_key_file_that_others_can_read_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    find_api_key(SGLangConfig(api_key_file=key_file(tmp_path)))
    assert caplog.text == ""

    find_api_key(SGLangConfig(api_key_file=key_file(tmp_path, mode=0o644)))
    assert "readable by others: chmod 600" in caplog.text


def test_key_shows_in_no_text_form() -> None:
    assert KEY not in f"{ApiKey(KEY)!r} {ApiKey(KEY)!s}"


def test_server_that_lets_strangers_in_is_refused() -> None:
    with serve(FakeSGLang()) as url:
        client = SGLangClient(url, request_timeout_seconds=5, api_key=ApiKey(KEY))

        with pytest.raises(EngineError, match="answers without the API key"):
            client.check_guard()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("10.1.2.3", "http://10.1.2.3:80"),
        ("::", "http://[::1]:80"),
        ("node-17", "http://node-17:80"),
    ],
)
def test_address_is_one_that_the_server_listens_on(host: str, url: str) -> None:
    assert address_of(host, 80) == url


def test_loopback_is_told_from_other_addresses() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.0.0.9")] == [
        True
    ] * 4
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.1", "localhost.org"))


@pytest.mark.parametrize(
    "argument",
    ["--api-key=abc", "--host", "--hos", "--api", "--config", "--port=1", "--tokenizer-worker-num"],
)
def test_arguments_that_would_go_around_the_key_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match="extra_args must not have --") as error:
        SGLangConfig(extra_args=(argument,))

    assert "abc" not in str(error.value).partition("[type=")[0]


@pytest.mark.parametrize("command", ["check", "train"])
def test_missing_key_is_refused_before_anything_is_started(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(__file__).parents[4] / "configs/demo/run.toml"
    flags = ("--rollout.sglang.host", "0.0.0.0", "--run-folder", str(tmp_path / "run"))

    assert main([command, str(config), *flags]) == 2

    assert "lets other machines reach the server" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()
