"""The real router of SGLang in front of two real servers."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import urllib3

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import SampleRequest
from prefixrl_mcore.rollout.sglang.engine import SGLangEngine
from tests.support.pool_requests import params_of, requests_of
from tests.support.ports import free_port
from tests.support.sglang_environments import sglang_python
from tests.support.tiny_models import build_tiny_qwen3, write_tiny_qwen3

pytestmark = pytest.mark.slow

START_SECONDS = 300.0


@contextmanager
def routing(urls: tuple[str, ...], log_file: Path) -> Iterator[str]:
    """Run a router in front of servers; yield its URL once it knows them all."""
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        *(str(sglang_python("router")), "-m", "sglang_router.launch_router"),
        *("--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--policy", "cache_aware"),
        *("--prometheus-port", str(free_port()), "--worker-urls", *urls),
    ]
    with log_file.open("wb") as log:
        router = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_SECONDS
        while num_healthy_workers(url) < len(urls):
            assert router.poll() is None, log_file.read_text()
            assert time.monotonic() < deadline, log_file.read_text()
            time.sleep(0.2)
        yield url
    finally:
        router.kill()
        router.wait()


def num_healthy_workers(url: str) -> int:
    try:
        answer = urllib3.request("GET", f"{url}/workers", retries=False, timeout=5)
    except urllib3.exceptions.HTTPError:
        return 0
    workers = answer.json()["workers"] if answer.status == 200 else []
    return sum(worker["is_healthy"] for worker in workers)


def load(engine: SGLangEngine, version: int) -> None:
    model = build_tiny_qwen3(seed=version)
    weights = [(name, weight.detach()) for name, weight in model.named_parameters()]
    engine.load_weights(lambda: iter(weights), version)


def test_engine_behind_a_router_gets_every_completion_also_when_a_server_dies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sglang_python("router")  # skips before servers are started
    folder = write_tiny_qwen3(tmp_path / "model", seed=0)

    def engine_of(**settings: object) -> SGLangEngine:
        return SGLangEngine(
            folder,
            SGLangConfig.model_validate({"start_timeout_seconds": START_SECONDS} | settings),
            logits_dtype="float32",
            max_total_tokens=900,
            logs_folder=tmp_path / "logs",
        )

    owner = engine_of(python=sglang_python(), num_servers=2)
    try:
        servers = owner.servers
        urls = tuple(server.client.url for server in servers)
        with routing(urls, tmp_path / "router.log") as router_url:
            engine = engine_of(
                urls=urls,
                router_url=router_url,
                health_every_seconds=1,
                health_timeout_seconds=5,
                max_failures=2,
                max_restarts=0,
            )
            for version in (1, 2):
                load(engine, version)
                groups = engine.sample(requests_of(12, 8), params_of(10, max_total_tokens=900))
                completions = [one for group in groups for one in group]
                assert [len(one.token_ids) for one in completions] == [10] * 96
                assert {one.policy_version for one in completions} == {version}
                metrics = engine.take_metrics()
                assert metrics["engine/num_requests"] == 12
                assert metrics["engine/num_reissued_requests"] == 0
                # n samples are one request, which the router does not take apart: its server makes
                # a pass over the 50 context tokens, and 49 are cached for each of the 8 samples.
                hits = (8 * 49 - 50) / (8 * 50)
                assert metrics["engine/cache_hit_fraction"] == pytest.approx(hits)

            hit: list[int] = []

            def kill_one(*_counts: int) -> None:
                if not hit:
                    hit.append(servers[1].supervisor_pid)
                    os.killpg(servers[1].supervisor_pid, signal.SIGKILL)

            short = SampleRequest(
                request_id="short", context_token_ids=(5,) * 795, num_samples=1, seed=0
            )
            groups = engine.sample(
                [short, *requests_of(9, 2)], params_of(700, max_total_tokens=900), kill_one
            )

            assert hit
            rest = [one for group in groups[1:] for one in group]
            assert [len(one.token_ids) for one in rest] == [700] * 18
            assert {one.policy_version for one in rest} == {2}
            assert "server 1: ready -> dead: 2 health checks in a row failed" in caplog.text
            assert engine.take_metrics()["engine/num_ready_servers"] == 1
            engine.close()
    finally:
        owner.close()
