"""Whether a server is on this machine, and where it finds this one."""

import socket
from urllib.parse import urlparse

from prefixrl_mcore.rollout.engine import EngineError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def is_here(url: str) -> bool:
    """Return whether the host of ``url`` is this machine: it has the host's address.

    To be asked once: who resolves names may give another answer later.

    Raises:
        EngineError: if nobody knows the host.
    """
    host = urlparse(url).hostname or ""
    return host in _LOOPBACK or any(
        _is_bound(family, address) for family, address in _resolved(host)
    )


def address_for(url: str) -> str:
    """Return an address of this machine that the server at ``url`` can reach."""
    host = urlparse(url).hostname or ""
    if host in _LOOPBACK:
        return "127.0.0.1"
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing; chooses the interface
        return probe.getsockname()[0]


def _resolved(host: str) -> list[tuple[int, str]]:
    """Return (family, address) of a host."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise EngineError(
            f"SGLang: the host {host!r} of a server has no address: {error}; correct "
            "rollout.sglang.urls, or have this machine resolve the name"
        ) from error
    return [(family, str(address[0])) for family, _, _, _, address in found]


def _is_bound(family: int, address: str) -> bool:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
