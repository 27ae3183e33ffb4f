"""Weights from a policy on four ranks into real SGLang servers, by every transport.

Skipped where SGLang's environment is missing; fails there instead if PREFIXRL_REQUIRE_SGLANG=1.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixrl_mcore.config.policy import OptimizerConfig
from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.policy.policy import MegatronPolicy
from prefixrl_mcore.policy.serving import CollectiveServices
from prefixrl_mcore.records import TrainingSequence
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.sglang.launch import ServerLaunch
from prefixrl_mcore.rollout.sglang.payloads import generate_payload
from prefixrl_mcore.rollout.sglang.server import SGLangServer
from prefixrl_mcore.rollout.weight_names import read_weight_coverage
from prefixrl_mcore.rollout.weight_sync.buckets import pack_buckets
from prefixrl_mcore.rollout.weight_sync.checksums import check_weights
from prefixrl_mcore.rollout.weight_sync.disk import Disk
from prefixrl_mcore.rollout.weight_sync.distributed import Broadcast
from prefixrl_mcore.rollout.weight_sync.sync import SyncReport, is_incomplete, sync_weights
from prefixrl_mcore.rollout.weight_sync.tensor import TensorByValue
from prefixrl_mcore.rollout.weight_sync.transport import SyncTarget, Transport
from tests.support.fake_sglang import FakeSGLang, serve
from tests.support.hf_logprobs import hf_completion_logprobs
from tests.support.layouts import parallel_config
from tests.support.policies import TEMPERATURE, build_policy, make_batch
from tests.support.ranks import run_on_ranks
from tests.support.sglang_environments import sglang_python
from tests.support.tiny_models import build_tiny_llama, build_tiny_qwen3, write_model_folder

pytestmark = pytest.mark.slow

# Both sides compute in float32, in other orders: 4e-6 nats were measured.
LOGPROB_TOLERANCE = 3e-5

# What an update moves: the engine is really sampling with the weights of before.
STALE_GAP = 1e-3

BUCKET_BYTES = 50_000
TP2_PP2 = parallel_config(tp=2, pp=2)

MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "qwen3": build_tiny_qwen3,
    "llama": build_tiny_llama,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A running server and what it serves."""

    folder: Path
    url: str

    def target(self) -> SyncTarget:
        client = SGLangClient(self.url, request_timeout_seconds=60)
        return SyncTarget(client=client, num_ranks=1, name=self.url)


@pytest.fixture(scope="module", params=list(MODELS))
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serving(sglang_python(), tmp_path_factory.mktemp(request.param), request.param) as served:
        yield served


@contextmanager
def serving(python: Path, root: Path, model: str) -> Iterator[Served]:
    """Serve a tiny model with the SGLang of an interpreter."""
    folder = write_model_folder(MODELS[model](), root / "model")
    launch = ServerLaunch(
        name="server 0",
        model_folder=folder,
        config=SGLangConfig(python=python),
        logits_dtype="float32",
        device="cpu",
        gpus=(),
        max_total_tokens=200,
        weight_version="of the folder",
    )
    server = SGLangServer.start(launch, root / "server.log", cancelled=threading.Event())
    try:
        yield Served(folder=folder, url=server.client.url)
    finally:
        server.stop()


def transport_named(name: str, folder: Path) -> Transport:
    if name == "disk":
        return Disk(folder)
    return Broadcast("gloo", timeout_seconds=60) if name == "distributed" else TensorByValue()


def push(
    served: Served,
    transport: Transport,
    stream: Callable[[], Iterator[tuple[str, Tensor]]],
    weight_version: str,
    *others: SyncTarget,
) -> SyncReport:
    """Send weights to the server, as an engine does it."""
    return sync_weights(
        [served.target(), *others],
        transport,
        lambda: pack_buckets(
            stream(),
            read_weight_coverage(served.folder),
            dtype=torch.float32,
            bucket_bytes=BUCKET_BYTES,
        ),
        weight_version,
    )


def check(served: Served, weights: Iterator[tuple[str, Tensor]]) -> int:
    """Compare the checksums of the server and of ``weights``."""
    return check_weights(
        [served.target()], weights, dtype=torch.float32, num_key_value_heads=2, is_cuda=False
    )


def sample(served: Served, weight_version: str) -> list[TrainingSequence]:
    """Sample completions, which must be stamped with ``weight_version``."""
    client = SGLangClient(served.url, request_timeout_seconds=60)
    sequences: list[TrainingSequence] = []
    for index, context in enumerate([(5,), (4, 9, 17, 21), tuple(range(4, 30))]):
        answers = client.generate(
            generate_payload(
                context_token_ids=context,
                num_samples=2,
                max_new_tokens=12,
                temperature=TEMPERATURE,
                stop_token_ids=(),
                request_id=f"{weight_version}/{index}.",
            )
        )
        for number, answer in enumerate(answers):
            meta = answer["meta_info"]
            assert meta["weight_version"] == weight_version
            sequences.append(
                TrainingSequence(
                    sequence_id=f"{index}/{number}",
                    group_index=index,
                    context_token_ids=context,
                    completion_token_ids=tuple(answer["output_ids"]),
                    advantage=1.0,
                    rollout_logprobs=tuple(t[0] for t in meta["output_token_logprobs"]),
                )
            )
    return sequences


def largest_gap(policy: MegatronPolicy, sequences: list[TrainingSequence]) -> float:
    """Return the largest difference of engine's and policy's logprobs; all ranks call this."""
    batch = make_batch(sequences, streams_multiple=2)
    return max(
        float(np.abs(stream.rollout_logprobs_R - logprobs_R).max())
        for stream, (logprobs_R, _) in zip(batch.streams, policy.row_statistics(batch), strict=True)
        if stream.num_rows
    )


def train_and_sync(
    rank: int, served: Served, transports: list[str], folder: Path
) -> list[tuple[str, float, float]]:
    """Update, sync and sample; return each transport's gaps before and after the sync."""
    optimizer = OptimizerConfig(lr=1e-3)
    policy = build_policy(served.folder, parallel=TP2_PP2, optimizer=optimizer)
    services = CollectiveServices({"export": policy.export_weights})
    stream = partial(services.ask, "export")
    gaps: list[tuple[str, float, float]] = []
    version = "of the folder"
    for index, name in enumerate(transports):
        policy.update(make_batch(streams_multiple=2))
        stale = services.run_on_first(lambda version=version: sample(served, version))
        version = f"version {index}"

        def sync(name: str = name, version: str = version) -> list[TrainingSequence]:
            report = push(served, transport_named(name, folder), stream, version)
            assert report.failed == {}
            assert report.num_buckets > 3
            check(served, stream())
            return sample(served, version)

        fresh = services.run_on_first(sync)
        gaps.append((name, largest_gap(policy, stale), largest_gap(policy, fresh)))
    return gaps


def test_engine_and_policy_on_four_ranks_agree_after_every_sync_and_not_before(
    served: Served, tmp_path: Path
) -> None:
    transports = ["tensor", "distributed", "disk", "distributed", "tensor"]

    results = run_on_ranks(train_and_sync, served, transports, tmp_path, world_size=4)

    assert results[1:] == results[:1] * 3
    assert [name for name, _, _ in results[0]] == transports
    for name, before, after in results[0]:
        assert before > STALE_GAP, name
        assert after < LOGPROB_TOLERANCE, name
    assert list(tmp_path.iterdir()) == []


def named_weights(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    return [(name, weight.detach()) for name, weight in model.named_parameters()]


def test_checksums_find_the_one_element_that_differs(served: Served) -> None:
    build = build_tiny_llama if "llama" in str(served.folder) else build_tiny_qwen3
    weights = named_weights(build(seed=5))
    push(served, TensorByValue(), lambda: iter(weights), "of seed 5")
    assert check(served, iter(weights)) > 10

    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        changed = {n: w.clone() for n, w in weights}
        changed[name][3, 5] += 1e-6
        held = name.replace("k_proj", "qkv_proj")
        with pytest.raises(EngineError, match=rf"rank 0 are not the policy's.*1 differ: {held}\."):
            check(served, iter(changed.items()))


def test_server_paused_right_after_its_last_answer_is_updated(served: Served) -> None:
    """Such a server never counts as idle, and refuses to flush its cache, before it is resumed."""
    weights = named_weights(
        (build_tiny_llama if "llama" in str(served.folder) else build_tiny_qwen3)(seed=3)
    )
    client = SGLangClient(served.url, request_timeout_seconds=60)
    for index in range(6):
        client.generate(one_token(f"last answer {index}"))
        client.pause()

        report = push(served, TensorByValue(), lambda: iter(weights), f"after answer {index}")

        assert report.failed == {}
        assert client.weight_version() == f"after answer {index}"


def test_every_transport_updates_a_server_whose_updates_are_sessions(tmp_path: Path) -> None:
    with serving(sglang_python("sglang-next"), tmp_path, "qwen3") as served:
        for index, name in enumerate(["tensor", "distributed", "disk", "tensor"]):
            model = build_tiny_qwen3(seed=20 + index)
            weights = named_weights(model)

            report = push(
                served,
                transport_named(name, tmp_path / "files"),
                lambda weights=weights: iter(weights),
                f"by {name} {index}",
            )

            assert report.failed == {}
            assert check(served, iter(weights)) > 10
            assert_samples_are_of(model, sample(served, f"by {name} {index}"))


def assert_samples_are_of(model: PreTrainedModel, sequences: Iterable[TrainingSequence]) -> None:
    """Hold a server's logprobs against those of the model in transformers."""
    for sequence in sequences:
        expected = hf_completion_logprobs(
            model,
            sequence.context_token_ids,
            sequence.completion_token_ids,
            temperature=TEMPERATURE,
        )
        assert sequence.rollout_logprobs == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


def one_token(request_id: str) -> dict[str, Any]:
    return generate_payload(
        context_token_ids=(5, 6, 7),
        num_samples=1,
        max_new_tokens=1,
        temperature=TEMPERATURE,
        stop_token_ids=(),
        request_id=request_id,
    )


def die_half_way(served: Served, transport: str, folder: Path) -> None:
    """Begin an update, and kill this process with two buckets sent."""

    def weights() -> Iterator[tuple[str, Tensor]]:
        for index, pair in enumerate(named_weights(build_tiny_qwen3(seed=7))):
            if index == 12:
                time.sleep(0.5)  # let the last bucket go through
                os.kill(os.getpid(), signal.SIGKILL)
            yield pair

    push(served, transport_named(transport, folder), weights, "of a dead trainer")


@pytest.mark.parametrize("transport", ["tensor", "distributed", "disk"])
def test_update_that_a_trainer_died_in_is_recognised_and_made_good_by_the_next(
    served: Served, tmp_path: Path, transport: str
) -> None:
    if "llama" in str(served.folder):
        pytest.skip("one model is enough")
    child = multiprocessing.get_context("spawn").Process(
        target=die_half_way, args=(served, transport, tmp_path)
    )
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    client = SGLangClient(served.url, request_timeout_seconds=60)
    assert is_incomplete(client.weight_version())
    assert bool(list(tmp_path.iterdir())) == (transport == "disk")

    model = build_tiny_qwen3(seed=8)
    weights = named_weights(model)
    report = push(served, transport_named(transport, tmp_path), lambda: iter(weights), "next")

    assert report.failed == {}
    check(served, iter(weights))
    assert list(tmp_path.iterdir()) == []
    assert_samples_are_of(model, sample(served, "next"))


class DoesNotJoin(FakeSGLang):
    """Refuses to be part of a broadcast."""

    def answer(self, path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        if path == "/init_weights_update_group":
            return 400, {"success": False, "message": "no NCCL here"}
        return super().answer(path, payload)


def test_server_that_breaks_a_broadcast_is_left_out_and_the_others_get_the_weights(
    served: Served,
) -> None:
    weights = named_weights(
        (build_tiny_llama if "llama" in str(served.folder) else build_tiny_qwen3)(seed=9)
    )
    with serve(DoesNotJoin()) as url:
        client = SGLangClient(url, request_timeout_seconds=5)
        other = SyncTarget(client=client, num_ranks=1, name="the other")

        report = push(
            served, Broadcast("gloo", timeout_seconds=5), lambda: iter(weights), "nine", other
        )

    assert list(report.failed) == ["the other"], report.failed
    assert "no NCCL here" in report.failed["the other"]
    check(served, iter(weights))
