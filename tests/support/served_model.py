"""A tiny model on a real SGLang server: weights sent to it, samples and checksums of it."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.records import TrainingSequence
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.sglang.launch import ServerLaunch
from prefixrl_mcore.rollout.sglang.payloads import generate_payload
from prefixrl_mcore.rollout.sglang.server import SGLangServer
from prefixrl_mcore.rollout.weight_names import read_config_number, read_weight_coverage
from prefixrl_mcore.rollout.weight_sync.buckets import pack_buckets
from prefixrl_mcore.rollout.weight_sync.by_location import ByLocation
from prefixrl_mcore.rollout.weight_sync.checksums import check_weights
from prefixrl_mcore.rollout.weight_sync.disk import Disk
from prefixrl_mcore.rollout.weight_sync.distributed import Broadcast
from prefixrl_mcore.rollout.weight_sync.sync import SyncReport, sync_weights
from prefixrl_mcore.rollout.weight_sync.tensor import TensorByValue
from prefixrl_mcore.rollout.weight_sync.transport import SyncTarget, Transport
from tests.support.hf_logprobs import hf_completion_logprobs
from tests.support.policies import TEMPERATURE
from tests.support.tiny_models import write_model_folder

# Both sides compute in float32, in other orders: 4e-6 nats were measured.
LOGPROB_TOLERANCE = 3e-5

BUCKET_BYTES = 50_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A running server and what it serves."""

    folder: Path
    url: str
    num_ranks: int

    def target(self, *, is_here: bool = True) -> SyncTarget:
        client = SGLangClient(self.url, request_timeout_seconds=60)
        return SyncTarget(client=client, num_ranks=self.num_ranks, name=self.url, is_here=is_here)


@contextmanager
def serving(
    python: Path, root: Path, model: PreTrainedModel, *, num_ranks: int = 1
) -> Iterator[Served]:
    """Serve a model with the SGLang of an interpreter, on tensor-parallel ranks."""
    folder = write_model_folder(model, root / "model")
    launch = ServerLaunch(
        name="server 0",
        model_folder=folder,
        config=SGLangConfig(python=python, tensor_parallel_size=num_ranks),
        logits_dtype="float32",
        device="cpu",
        gpus=(),
        max_total_tokens=200,
        weight_version="of the folder",
    )
    server = SGLangServer.start(launch, root / "server.log", cancelled=threading.Event())
    try:
        yield Served(folder=folder, url=server.client.url, num_ranks=num_ranks)
    finally:
        server.stop()


def transport_named(name: str, folder: Path) -> Transport:
    if name == "disk":
        return Disk(folder)
    broadcast = Broadcast("gloo", timeout_seconds=60)
    if name == "by location":
        return ByLocation(TensorByValue(), broadcast)
    return broadcast if name == "distributed" else TensorByValue()


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
    """Compare the checksums of the server and of ``weights``; return how many."""
    return check_weights(
        [served.target()],
        weights,
        dtype=torch.float32,
        num_key_value_heads=read_config_number(served.folder, "num_key_value_heads"),
        is_cuda=False,
    ).num_digests


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


def named_weights(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    return [(name, weight.detach()) for name, weight in model.named_parameters()]


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
