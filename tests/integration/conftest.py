"""What holds for every whole run."""

from collections.abc import Iterator

import pytest

from tests.support.tiny_run import end_started_runs


@pytest.fixture(autouse=True)
def _no_run_outlives_its_test() -> Iterator[None]:
    yield
    end_started_runs()
