"""Pools of scripted fakes, for the tests of what a pool does with their faults."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.fake_pool import Pool
from tests.support.fake_sglang import FakeSGLang, serve
from tests.support.tiny_models import write_tiny_qwen3


@pytest.fixture(scope="session")
def pool_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pool(pool_model: Path, tmp_path: Path) -> Iterator[Pool]:
    with ExitStack() as stack:
        fakes = [FakeSGLang() for _ in range(3)]
        urls = tuple(stack.enter_context(serve(fake)) for fake in fakes)
        yield Pool(
            fakes=fakes, urls=urls, model_folder=pool_model, logs_folder=tmp_path, stack=stack
        )
        for fake in fakes:  # what hangs must not hang the end of the test
            if fake.hold is not None:
                fake.hold.set()
