"""Judge functions that misbehave on demand; the pool imports them by name in its children."""

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from prefixrl_mcore.rewards.wire import Json

_LEAK: list[bytes] = []
_TOO_MANY_BYTES = 1 << 28
"""Refused by the memory limit of the tests' pools, and by nothing else."""


def misbehave(payload: Json) -> Json:
    """Do what ``[verb, argument...]`` says; return the payload if the verb has no result."""
    if isinstance(payload, list) and payload and payload[0] in _VERBS:
        result = _VERBS[str(payload[0])](*payload[1:])
        return payload if result is None else result
    return payload


def _slow_pid() -> int:
    time.sleep(0.05)
    return os.getpid()


def _hang() -> None:
    sum(itertools.repeat(0))  # in C: no signal handler of Python ever runs


def _eat_memory() -> int:
    return len(bytes(_TOO_MANY_BYTES))


def _eat_memory_quietly() -> str:
    try:
        return str(_eat_memory())
    except MemoryError:
        return "fine"


def _leak(num_bytes: int) -> None:
    _LEAK.append(bytes(num_bytes))


def _exit() -> NoReturn:
    os._exit(3)


def _die_once(marker: str) -> str:
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


def _kill_nursery() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def _kill_nursery_once(marker: str) -> str:
    if not Path(marker).exists():
        Path(marker).touch()
        _kill_nursery()
    return "survived"


def _recurse() -> None:
    _recurse()


def _raise(name: str) -> NoReturn:
    raise {"ValueError": ValueError, "SystemExit": SystemExit}[name]("as told")


def _modules() -> Json:
    return [*sorted({name.partition(".")[0] for name in sys.modules})]


_VERBS: dict[str, Callable[..., Any]] = {
    "hang": _hang,
    "sleep": time.sleep,
    "eat memory": _eat_memory,
    "eat memory quietly": _eat_memory_quietly,
    "leak": _leak,
    "slow pid": _slow_pid,
    "abort": os.abort,
    "exit": _exit,
    "die once": _die_once,
    "kill nursery": _kill_nursery,
    "kill nursery once": _kill_nursery_once,
    "recurse": _recurse,
    "raise": _raise,
    "modules": _modules,
}
