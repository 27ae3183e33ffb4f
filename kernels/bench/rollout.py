"""``python -m bench.rollout``: a real SGLang server beside a policy on the same GPU.

With a broadcast it is on the next GPU, as NCCL wants; on a machine of one that is not measured.

A Qwen3 of 0.6e9 parameters with random weights. Measured are, for each transport, the time of a
weight update in GB/s; sleeping and waking; sampled tokens per second; and how far the engine's
logprobs are from those of the same weights in PyTorch, with a float32 and with a rounded head. What
cannot run here is in the record with the reason. ``--tiny`` is the same program with a tiny model
on any machine; without a GPU nothing is written, and there is no memory to give back.

It needs the trainer (``prefixrl_mcore``) and SGLang's environment. Never run on a GPU so far.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, set_seed

from bench.gpu_record import write_record
from bench.policy_case import FULL, TINY
from prefixrl_mcore.config.rollout import SGLangConfig, SyncConfig
from prefixrl_mcore.records import Completion
from prefixrl_mcore.rollout.engine import EngineError, SampleRequest, SamplingParams
from prefixrl_mcore.rollout.sglang.engine import SGLangEngine

RESULTS = Path(__file__).parent / "results"

TRANSPORTS = ("tensor", "distributed", "disk")

_NUM_SYNCS = 4
"""Updates per transport; the first, which connects and warms up, is not counted."""

LogitsName = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutCase:
    """A model, and the requests that it is sampled with."""

    name: str
    """Part of the record."""

    hf_config: dict[str, Any]
    """What ``config.json`` would say."""

    num_groups: int
    """Requests at once."""

    group_size: int
    """Completions of each."""

    context_tokens: int
    """Of each request."""

    completion_tokens: int
    """Of each completion."""


CASES = {
    False: RolloutCase(
        name="qwen3-0.6b",
        hf_config=FULL.hf_config,
        num_groups=32,
        group_size=8,
        context_tokens=1024,
        completion_tokens=512,
    ),
    True: RolloutCase(
        name="tiny",
        hf_config=TINY.hf_config,
        num_groups=2,
        group_size=2,
        context_tokens=8,
        completion_tokens=8,
    ),
}


class NotMeasurableError(Exception):
    """This machine lacks what a measurement needs; the message says what."""


class Bench:
    """One case on one device: the policy's weights, and a new server for each measurement."""

    def __init__(self, case: RolloutCase, python: Path, folder: Path, *, seed: int) -> None:
        """Make the model with random weights, and write it for the servers."""
        self.case = case
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._python = python
        self._folder = folder
        self._num_engines = 0
        set_seed(seed)
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        config = Qwen3Config(**case.hf_config, eos_token_id=None, bos_token_id=None)
        with torch.device(self.device):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model.eval().save_pretrained(folder / "model")
        generator = random.Random(seed)
        vocabulary = case.hf_config["vocab_size"]
        self.requests = [
            SampleRequest(
                request_id=f"group/{index}",
                context_token_ids=tuple(
                    generator.randrange(vocabulary) for _ in range(case.context_tokens)
                ),
                num_samples=case.group_size,
                seed=index,
            )
            for index in range(case.num_groups)
        ]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, a tied embedding once."""
        return sum(weight.numel() * weight.element_size() for weight in self.model.parameters())

    def engine(
        self,
        transport: str | None = None,
        logits_dtype: LogitsName = "float32",
    ) -> SGLangEngine:
        """Start a server: on the policy's GPU, or for a broadcast on the next one.

        Raises:
            EngineError: if it does not start.
        """
        self._num_engines += 1
        config = SGLangConfig.model_validate(
            {
                "python": self._python,
                "memory_fraction": 0.4,
                "sync": SyncConfig.model_validate({"transport": transport}),
            }
        )
        return SGLangEngine(
            self._folder / "model",
            config,
            logits_dtype=logits_dtype,
            max_total_tokens=self.case.context_tokens + self.case.completion_tokens,
            logs_folder=self._folder / f"logs-{self._num_engines}",
            device=self.device,
            colocated=transport != "distributed",
            num_trainer_ranks=1,
        )

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the policy's weights, as its export does."""
        for name, weight in self.model.named_parameters():
            yield name, weight.detach()

    def sample(self, engine: SGLangEngine) -> list[list[Completion]]:
        """Sample all requests to the full length."""
        params = SamplingParams(
            temperature=1.0,
            max_completion_tokens=self.case.completion_tokens,
            max_total_tokens=self.case.context_tokens + self.case.completion_tokens,
            stop_token_ids=(),
        )
        return engine.sample(self.requests, params)

    def sync_seconds(self, transport: str) -> dict[str, Any]:
        """Return the time of a weight update by one transport.

        Raises:
            NotMeasurableError: if it wants a GPU more than there is.
        """
        if transport == "distributed" and torch.cuda.device_count() == 1:
            raise NotMeasurableError("one GPU: NCCL wants another one for each process")
        engine = self.engine(transport)
        try:
            seconds = [
                self._timed(lambda version=version: engine.load_weights(self.weights, version))
                for version in range(_NUM_SYNCS)
            ]
            self.sample(engine)  # the weights are usable
        finally:
            engine.close()
        median = statistics.median(seconds[1:])
        return {
            "seconds": median,
            "all_seconds": seconds,
            "bytes": self.weight_bytes,
            "gigabytes_per_second": self.weight_bytes / 1e9 / median,
        }

    def sleep_and_wake(self) -> dict[str, Any]:
        """Return the time of giving memory back and taking it again, and how much it is."""
        if self.device == "cpu":
            raise EngineError("there is no device memory to give back on a CPU")
        engine = self.engine()
        try:
            self.sample(engine)
            before = torch.cuda.mem_get_info()[0]
            sleep_seconds = self._timed(engine.sleep)
            freed = torch.cuda.mem_get_info()[0] - before
            wake_seconds = self._timed(engine.wake)
            engine.load_weights(self.weights, 1)
            self.sample(engine)
        finally:
            engine.close()
        return {"sleep_seconds": sleep_seconds, "wake_seconds": wake_seconds, "freed_bytes": freed}

    def sampling(self, logits_dtype: LogitsName) -> dict[str, Any]:
        """Return sampled tokens per second, and the gap to PyTorch's logprobs of these weights."""
        engine = self.engine(None, logits_dtype)
        try:
            self.sample(engine)  # graphs, kernels, memory
            engine.load_weights(self.weights, 1)  # an empty cache
            groups: list[list[Completion]] = []
            seconds = self._timed(lambda: groups.extend(self.sample(engine)))
        finally:
            engine.close()
        num_tokens = sum(len(one.token_ids) for group in groups for one in group)
        gaps = self._gaps(groups, logits_dtype)
        return {
            "tokens_per_second": num_tokens / seconds,
            "seconds": seconds,
            "gap_mean_nats": gaps.mean().item(),
            "gap_p99_nats": gaps.quantile(0.99).item(),
            "gap_max_nats": gaps.max().item(),
        }

    @torch.no_grad()
    def _gaps(self, groups: list[list[Completion]], logits_dtype: LogitsName) -> Tensor:
        """Return [num_tokens] float32, nats: absolute differences, one completion per group."""
        gaps = []
        for request, (completion, *_) in zip(self.requests, groups, strict=True):
            ids = torch.tensor([[*request.context_token_ids, *completion.token_ids]])
            hidden = self.model.model(ids.to(self.device)).last_hidden_state[0]
            rows = hidden[len(request.context_token_ids) - 1 : -1]
            head = self.model.lm_head.weight
            logits = rows.float() @ head.float().T if logits_dtype == "float32" else rows @ head.T
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            tokens = torch.tensor(completion.token_ids, device=self.device)
            ours = logprobs.gather(1, tokens[:, None])[:, 0]
            theirs = torch.tensor(completion.logprobs, device=self.device)
            gaps.append((ours - theirs).abs())
        return torch.cat(gaps).cpu()

    def _timed(self, call: Callable[[], object]) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all measurements and return the exit status: 1 if one failed."""
    options = _parse(arguments)
    console = Console(stderr=True)
    has_cuda = torch.cuda.is_available()
    if not has_cuda and not options.tiny:
        console.print("bench.rollout: no CUDA device; --tiny runs a tiny model on the CPU")
        return 1
    case = CASES[options.tiny]
    with tempfile.TemporaryDirectory(prefix="bench-rollout-") as folder:
        bench = Bench(case, options.sglang_python, Path(folder), seed=options.seed)
        measurements: dict[str, Callable[[], dict[str, Any]]] = {
            f"sync by {name}": lambda name=name: bench.sync_seconds(name) for name in TRANSPORTS
        }
        if has_cuda:
            measurements["sleep and wake"] = bench.sleep_and_wake
            measurements["sampling, rounded head"] = lambda: bench.sampling("bfloat16")
        measurements["sampling, float32 head"] = lambda: bench.sampling("float32")
        entries = [_run(name, measure, console) for name, measure in measurements.items()]
    Console(width=None if console.is_terminal else 120).print(_table(entries))
    if has_cuda:
        console.print(f"[dim]{write_record('rollout', case, {'measurements': entries}, options)}")
    else:
        console.print("no CUDA device: nothing written")
    return int(any(entry["status"] == "failed" for entry in entries))


def _run(name: str, measure: Callable[[], dict[str, Any]], console: Console) -> dict[str, Any]:
    """Return the outcome of one measurement: ``ok``, ``not measured`` or ``failed``."""
    console.print(name)
    try:
        return {"measurement": name, "status": "ok", "result": measure()}
    except NotMeasurableError as obstacle:
        return {
            "measurement": name,
            "status": "not measured",
            "detail": f"not measured: {obstacle}",
        }
    except Exception as error:  # out of memory, a server that does not start: a result, too
        console.print_exception()
        return {
            "measurement": name,
            "status": "failed",
            "detail": f"{type(error).__name__}: {error}",
        }


def _table(entries: Sequence[dict[str, Any]]) -> Table:
    table = Table("measurement", "result", title="a SGLang server beside the policy")
    for entry in entries:
        numbers = entry.get("result", {})
        text = ", ".join(
            f"{name} {value:.4g}" for name, value in numbers.items() if not isinstance(value, list)
        )
        table.add_row(entry["measurement"], text or entry["detail"].splitlines()[0])
    return table


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.rollout", description=__doc__)
    add = parser.add_argument
    add("--tiny", action="store_true", help="a tiny model, on any machine")
    add("--sglang-python", type=Path, default=SGLangConfig().python, help="of its environment")
    add("--output", type=Path, default=RESULTS, help="folder of the JSON")
    add("--commit", help="commit of a copy without its repository")
    add("--seed", type=int, default=0, help="of weights and contexts")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
