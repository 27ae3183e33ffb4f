"""Pools of scripted fakes: three servers, an engine on them, and what it is asked for."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import SampleRequest, SamplingParams
from prefixrl_mcore.rollout.interruption import (
    IsInterrupted,
    never_interrupted,
)
from prefixrl_mcore.rollout.sglang.engine import SGLangEngine
from tests.support.fake_sglang import FakeSGLang
from tests.support.tiny_models import build_tiny_qwen3

PARAMS = SamplingParams(
    temperature=1.0, max_completion_tokens=6, max_total_tokens=50, stop_token_ids=()
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Three fakes, and what makes an engine on them."""

    fakes: list[FakeSGLang]
    urls: tuple[str, ...]
    model_folder: Path
    logs_folder: Path
    stack: ExitStack

    def engine(
        self, *, is_interrupted: IsInterrupted = never_interrupted, **settings: Any
    ) -> SGLangEngine:
        config = {
            "urls": self.urls,
            "start_timeout_seconds": 60,
            "health_every_seconds": 0.05,
            "health_timeout_seconds": 30,  # a fake hangs nowhere: a busy machine would
        }
        engine = SGLangEngine(
            self.model_folder,
            SGLangConfig(**(config | settings)),
            logits_dtype="float32",
            max_total_tokens=100,
            logs_folder=self.logs_folder,
            is_interrupted=is_interrupted,
        )
        self.stack.callback(engine.close)
        return engine


def requests_of(count: int, num_samples: int = 2) -> list[SampleRequest]:
    return [
        SampleRequest(
            request_id=f"r{index}",
            context_token_ids=(5, 6, 7 + index),
            num_samples=num_samples,
            seed=0,
        )
        for index in range(count)
    ]


def weights() -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, weight.detach()) for name, weight in build_tiny_qwen3().named_parameters())


def tokens_of(groups: list[list[Any]]) -> list[list[int]]:
    return [[len(one.token_ids) for one in group] for group in groups]


def break_off_for_good(fake: FakeSGLang) -> None:
    """Have a server break every connection, from the first request on."""
    answer, has_broken = fake.answer, threading.Event()

    def break_off(path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        if path == "/generate":
            has_broken.set()
        return (0, None) if has_broken.is_set() else answer(path, payload)

    fake.answer = break_off  # type: ignore[method-assign]
