"""Rank 0 works alone and asks the others for collectives, over real processes."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException

from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.policy.serving import CollectiveServices
from tests.support.ranks import run_on_ranks

NUM_ITEMS = 5


def sums() -> Iterator[int]:
    """Yield 0, 1 * world size, 2 * world size, ... by one all-reduce each."""
    for item in range(NUM_ITEMS):
        total = torch.tensor([item])
        dist.all_reduce(total)
        yield int(total)


def take(services: CollectiveServices, number: int) -> list[int]:
    """Ask for the sums and leave them after ``number``."""
    items = services.ask("sums")
    return [next(items) for _ in range(number)]


def served(rank: int, function: Callable[[CollectiveServices], object]) -> object:
    """Run ``function`` on rank 0, and then prove that the ranks are in step."""
    services = CollectiveServices({"sums": sums})
    try:
        result = services.run_on_first(lambda: function(services))
    except ValueError as error:
        result = repr(error)
    in_step = torch.tensor([rank])
    dist.all_reduce(in_step)
    return result, int(in_step)


def ask_twice(services: CollectiveServices) -> object:
    return [list(services.ask("sums")), list(services.ask("sums"))]


def ask_nothing(services: CollectiveServices) -> object:
    return "nothing"


def leave_half_way(services: CollectiveServices) -> object:
    return take(services, 2)


def leave_and_ask_again(services: CollectiveServices) -> object:
    first = services.ask("sums")
    next(first)
    again = list(services.ask("sums"))
    return [again, list(first)]  # the first was ended by asking again


def fail_half_way(services: CollectiveServices) -> object:
    for item in services.ask("sums"):
        if item:
            raise ValueError(f"cannot use {item}")
    return None


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (ask_twice, [[0, 3, 6, 9, 12]] * 2),
        (ask_nothing, "nothing"),
        (leave_half_way, [0, 3]),
        (leave_and_ask_again, [[0, 3, 6, 9, 12], []]),
        (fail_half_way, "ValueError('cannot use 3')"),
    ],
)
def test_every_rank_gets_what_rank_0_made_of_the_collectives(
    function: Callable[[CollectiveServices], object], expected: object
) -> None:
    assert run_on_ranks(served, function, world_size=3) == [(expected, 3)] * 3


def failing_sums(failing_rank: int) -> Iterator[int]:
    for item in sums():
        if item and dist.get_rank() == failing_rank:
            raise MemoryError("no room for a part")
        yield item


def failing(rank: int, failing_rank: int, folder: Path) -> None:
    """Fail in the service; note what this rank raised, and end as a rank that fails does."""
    services = CollectiveServices({"sums": lambda: failing_sums(failing_rank)})
    try:
        services.run_on_first(lambda: list(services.ask("sums")))
    except Exception as error:
        (folder / str(rank)).write_text(f"{type(error).__name__}: {error}")
    os._exit(0)  # closes the connections, as the end of a failing process does


@pytest.mark.parametrize("failing_rank", [1, 2])
def test_failure_of_another_rank_in_a_service_reaches_rank_0_with_its_rank(
    tmp_path: Path, failing_rank: int
) -> None:
    with pytest.raises(FileNotFoundError):  # the ranks end without a result
        run_on_ranks(failing, failing_rank, tmp_path, world_size=3)

    expected = f"rank {failing_rank} failed in 'sums': MemoryError: no room for a part"
    assert (tmp_path / "0").read_text() == f"ServiceFailure: {expected}"
    assert (tmp_path / str(failing_rank)).read_text() == f"ServiceFailure: {expected}"


def test_alone_a_service_is_a_plain_generator() -> None:
    services = CollectiveServices({"numbers": lambda: iter([1, 2, 3])})

    assert services.run_on_first(lambda: list(services.ask("numbers"))) == [1, 2, 3]
    with pytest.raises(RuntimeError, match="'numbers': no rank is standing by"):
        services.ask("numbers")
    with pytest.raises(ZeroDivisionError):
        services.run_on_first(lambda: 1 // len([*services.ask("numbers")][3:]))


def hang_half_way(rank: int, limit_seconds: float, log_file: Path) -> None:
    """Ask for sums that rank 1 no longer takes part in after the second."""

    def hanging_sums() -> Iterator[int]:
        for index, item in enumerate(sums()):
            if rank == 1 and index == 1:
                time.sleep(120)
            yield item

    def slow_consumer() -> None:
        logging.basicConfig(filename=log_file, force=True)
        for _ in services.ask("sums"):
            time.sleep(1.2 * limit_seconds)  # rank 0's own time does not count

    services = CollectiveServices({"sums": hanging_sums}, limit_seconds=limit_seconds)
    services.run_on_first(slow_consumer)


def hang_in_the_command(rank: int, limit_seconds: float, log_file: Path) -> None:
    """Ask for sums in a collective that does not end, as NCCL's do when a rank hangs."""
    logging.basicConfig(filename=log_file, force=True)
    broadcast = dist.broadcast_object_list

    def hang(objects: list[str | None], src: int) -> None:
        if rank == 0 and objects == ["sums"]:
            time.sleep(10)
        broadcast(objects, src=src)

    dist.broadcast_object_list = hang
    services = CollectiveServices({"sums": sums}, limit_seconds=limit_seconds)
    services.run_on_first(lambda: list(services.ask("sums")))


def test_rank_0_ends_the_run_when_another_rank_keeps_it_from_asking(tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException) as ended:
        run_on_ranks(hang_in_the_command, 1.0, tmp_path / "log", world_size=2)

    assert ended.value.exit_code == exit_codes.STALLED
    assert "sums: nothing for 1 s after 0 items" in (tmp_path / "log").read_text()


def test_rank_0_ends_the_run_when_another_rank_hangs_in_a_service(tmp_path: Path) -> None:
    log_file = tmp_path / "log"
    started = time.monotonic()

    with pytest.raises(ProcessExitedException) as ended:
        run_on_ranks(hang_half_way, 3.0, log_file, world_size=2)

    assert ended.value.exit_code == exit_codes.STALLED
    assert time.monotonic() - started < 100
    assert "sums: nothing for 3 s after 2 items: rank 0 waits for a rank" in log_file.read_text()
