"""The API key of a real server, in both protocols: asked for everywhere, shown nowhere."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import urllib3

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError, SampleRequest, SamplingParams
from prefixrl_mcore.rollout.sglang.engine import SGLangEngine
from tests.support.sglang_environments import sglang_python
from tests.support.tiny_models import build_tiny_qwen3, write_tiny_qwen3

pytestmark = pytest.mark.slow

KEY = "a-key-that-nobody-shows-77aa02"
FREE_PATHS = ("/health", "/ready", "/metrics")
"""Beginnings of the paths that SGLang answers to everybody."""


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """A server with a key, and where it was made."""

    engine: SGLangEngine
    model: Path
    folder: Path


@pytest.fixture(scope="module", params=["sglang", "sglang-next"])
def guarded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guarded]:
    python = sglang_python(request.param)
    folder = tmp_path_factory.mktemp("guarded")
    model = write_tiny_qwen3(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFIXRL_SGLANG_API_KEY", KEY)
        # Every address of this machine: what needs a key.
        config = SGLangConfig(python=python, host="0.0.0.0", start_timeout_seconds=300)
        engine = start(model, config, folder)
    try:
        yield Guarded(engine=engine, model=model, folder=folder)
    finally:
        engine.close()


def start(model: Path, config: SGLangConfig, folder: Path) -> SGLangEngine:
    return SGLangEngine(
        model, config, logits_dtype="float32", max_total_tokens=100, logs_folder=folder / "logs"
    )


def url_of(guarded: Guarded) -> str:
    (server,) = guarded.engine.servers
    return server.client.url


def sample(engine: SGLangEngine) -> int:
    """Return the version of the weights that sampled."""
    request = SampleRequest(request_id="r", context_token_ids=(5, 6), num_samples=2, seed=0)
    params = SamplingParams(
        temperature=1.0, max_completion_tokens=4, max_total_tokens=50, stop_token_ids=()
    )
    ((first, _),) = engine.sample([request], params)
    return first.policy_version


def test_right_key_samples_and_updates_weights(guarded: Guarded) -> None:
    weights = [(name, weight.detach()) for name, weight in build_tiny_qwen3().named_parameters()]

    guarded.engine.load_weights(lambda: iter(weights), 5)

    assert sample(guarded.engine) == 5


def test_without_the_key_every_endpoint_answers_401(guarded: Guarded) -> None:
    url = url_of(guarded)
    http = urllib3.PoolManager()
    headers = {"Authorization": f"Bearer {KEY}"}
    paths = json.loads(http.request("GET", f"{url}/openapi.json", headers=headers).data)["paths"]
    endpoints = {
        (method.upper(), path)
        for path, methods in paths.items()
        for method in methods
        if not path.startswith(FREE_PATHS)
    }
    assert {("POST", "/generate"), ("POST", "/update_weights_from_tensor")} <= endpoints
    assert ("GET", "/model_info") in endpoints

    answers = {
        endpoint: http.request(endpoint[0], url + endpoint[1]).status
        for endpoint in sorted(endpoints | {("GET", "/openapi.json")})
    }

    # 403: endpoints that want a key of their own, which no server of ours has.
    assert {endpoint for endpoint, status in answers.items() if status not in (401, 403)} == set()
    assert answers["POST", "/generate"] == 401
    assert http.request("GET", f"{url}/health").status == 200


@pytest.mark.parametrize(
    "key", [pytest.param(None, id="no key"), pytest.param("another-key-altogether", id="wrong key")]
)
def test_server_that_runs_elsewhere_wants_its_key(
    key: str | None, guarded: Guarded, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text(f"{key}\n")
    file.chmod(0o600)
    config = SGLangConfig(urls=(url_of(guarded),), api_key_file=None if key is None else file)

    with pytest.raises(EngineError, match=r"answered 401.*set PREFIXRL_SGLANG_API_KEY or rollout"):
        start(guarded.model, config, tmp_path)


def test_key_file_opens_a_server_that_runs_elsewhere(guarded: Guarded, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)

    engine = start(
        guarded.model, SGLangConfig(urls=(url_of(guarded),), api_key_file=file), tmp_path
    )

    assert engine.policy_version == -1
    engine.close()


def test_key_is_in_no_file_no_command_line_and_no_answer(guarded: Guarded) -> None:
    sample(guarded.engine)
    (server,) = guarded.engine.servers
    family = [psutil.Process(server.supervisor_pid)]
    family += family[0].children(recursive=True)
    assert len(family) >= 4  # supervisor, HTTP server, scheduler, detokenizer

    files = [path for path in guarded.folder.rglob("*") if path.is_file()]
    assert any(path.name == "sglang-0-1.log" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    for process in family:
        assert KEY not in " ".join(process.cmdline())
        assert KEY not in " ".join(f"{k}={v}" for k, v in process.environ().items())
    assert KEY not in json.dumps(server.client.server_info())
    assert KEY not in repr(vars(server.client._connection))
