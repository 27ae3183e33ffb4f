"""Ports for servers that are started later, in other processes."""

import itertools
import os
import socket
from contextlib import suppress

_FIRST = 10_000
_NUM = 10_000
_turns = itertools.count(os.getpid() * 101)


def free_port() -> int:
    """Return a port that nobody listens on, and that nobody is given who asks for any.

    It is below those that the kernel hands out, and not near those of another test run.
    """
    for turn in itertools.islice(_turns, _NUM):
        port = _FIRST + turn % _NUM
        with suppress(OSError), socket.socket() as one:
            one.bind(("", port))
            return port
    raise AssertionError(f"no free port from {_FIRST} to {_FIRST + _NUM - 1}")
