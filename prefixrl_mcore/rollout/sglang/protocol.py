"""What one SGLang server can do: asked once when it is started or found, not guessed from names.

The supported versions have two protocols. From 0.5.21 on, weight updates stand between
``/begin_weight_update`` and ``/end_weight_update``; before, there are no such endpoints. The tests
run on both ends of the range.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefixrl_mcore.rollout.engine import EngineError

logger = logging.getLogger(__name__)

OLDEST_VERSION = "0.5.17"
NEWEST_VERSION = "0.5.23"
"""The supported versions of SGLang, both included; ``env/`` has a locked environment of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerProtocol:
    """What a server can do, and how it was started."""

    version: str
    """SGLang's version; ``unknown`` if the server does not tell."""

    has_update_sessions: bool
    """Weight updates stand between begin and end calls."""

    has_float32_head: bool
    """A bfloat16 model's logits are computed in float32."""

    is_deterministic: bool
    """Deterministic inference is on: the seed of a request decides its completion."""

    has_prefix_cache: bool
    """Keys and values of equal beginnings are computed once."""

    can_release_memory: bool
    """Sleeping really gives device memory back."""

    def __str__(self) -> str:
        """Say all of it in one line."""
        parts = {
            "update sessions": self.has_update_sessions,
            "float32 head": self.has_float32_head,
            "deterministic inference": self.is_deterministic,
            "prefix cache": self.has_prefix_cache,
            "memory release": self.can_release_memory,
        }
        features = ", ".join(f"{name} {'on' if is_on else 'off'}" for name, is_on in parts.items())
        return f"SGLang {self.version}: {features}"


def read_protocol(
    server_info: Mapping[str, Any], *, has_update_sessions: bool, url: str
) -> ServerProtocol:
    """Return what a server can do, and log it.

    Args:
        server_info: the server's arguments, as ``/server_info`` reports them.
        has_update_sessions: whether it has the endpoint ``/begin_weight_update``.
        url: the server's address, for messages.

    Raises:
        EngineError: if its version is older than the oldest supported one.
    """
    protocol = ServerProtocol(
        version=str(server_info.get("version", "unknown")),
        has_update_sessions=has_update_sessions,
        has_float32_head=bool(server_info.get("enable_fp32_lm_head")),
        is_deterministic=bool(server_info.get("enable_deterministic_inference")),
        has_prefix_cache=not server_info.get("disable_radix_cache"),
        can_release_memory=bool(server_info.get("enable_memory_saver")),
    )
    logger.info("%s (%s)", protocol, url)
    _check_version(protocol.version, url)
    return protocol


def supported_range() -> str:
    """Return the supported versions in words."""
    return f"{OLDEST_VERSION} to {NEWEST_VERSION}"


def is_supported(version: str) -> bool:
    """Return whether a version is in the supported range."""
    numbers = _numbers(version)
    return numbers is not None and (
        _known_numbers(OLDEST_VERSION) <= numbers <= _known_numbers(NEWEST_VERSION)
    )


def _check_version(version: str, url: str) -> None:
    supported = f"{supported_range()} are supported"
    numbers = _numbers(version)
    if numbers is not None and numbers < _known_numbers(OLDEST_VERSION):
        raise EngineError(
            f"SGLang: the server at {url} is version {version}, which is too old; versions "
            f"{supported}; run `make setup-sglang` for an environment that has one"
        )
    if numbers is None or numbers > _known_numbers(NEWEST_VERSION):
        logger.warning(
            "SGLang: the server at %s is version %s, which no test has run on; versions %s",
            *(url, version, supported),
        )


def _known_numbers(version: str) -> tuple[int, ...]:
    numbers = _numbers(version)
    assert numbers is not None, f"{version!r} is not a version"
    return numbers


def _numbers(version: str) -> tuple[int, ...] | None:
    """Return the three numbers that a version begins with; None if it does not."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return None if match is None else tuple(int(number) for number in match.groups())
