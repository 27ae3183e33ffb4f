"""The API key of the SGLang servers: where it comes from, and when there must be one.

It is no setting: settings are written to the run folder and may stand on a command line. It comes
from the environment or from a file, is handed to a server through its standard input, and shows its
value to nobody who prints it.
"""

import contextlib
import ipaddress
import logging
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefixrl_mcore.config.rollout import SGLangConfig

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "PREFIXRL_SGLANG_API_KEY"

_MIN_LENGTH = 16
_READABLE_BY_OTHERS = 0o044


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A secret that does not show in logs, errors and debuggers."""

    secret: str = field(repr=False)
    """What a request must bring; printable ASCII without spaces."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of a request that brings it."""
        return {"Authorization": f"Bearer {self.secret}"}


def find_api_key(config: SGLangConfig) -> ApiKey | None:
    """Return the key of ``config.api_key_file``, or of the environment; None without either.

    Raises:
        ValueError: if the file cannot be read, or the key is no key; if ``config.host`` lets other
            machines in and there is no key. The key itself is in no message.
    """
    if config.api_key_file is not None:
        key = _read_file(config.api_key_file)
    elif API_KEY_VARIABLE in os.environ:
        key = _checked(os.environ[API_KEY_VARIABLE].strip(), API_KEY_VARIABLE)
    elif not config.urls and not is_loopback(config.host):
        raise ValueError(
            f'rollout.sglang.host = "{config.host}" lets other machines reach the server, which '
            "would run and replace the model for all of them: set the environment variable "
            f"{API_KEY_VARIABLE} or rollout.sglang.api_key_file to an API key, or leave the host "
            "at 127.0.0.1"
        )
    else:
        return None
    return key


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_file(path: Path) -> ApiKey:
    try:
        text = path.read_text(encoding="utf-8").strip()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"rollout.sglang.api_key_file {path} cannot be read as text: {type(error).__name__}; "
            "write the key into it, in one line"
        ) from None
    if mode & _READABLE_BY_OTHERS:
        logger.warning(
            "rollout.sglang.api_key_file %s is readable by others: chmod 600 %s", path, path
        )
    return _checked(text, f"rollout.sglang.api_key_file {path}")


def _checked(text: str, source: str) -> ApiKey:
    if len(text) < _MIN_LENGTH or re.fullmatch(r"[!-~]+", text) is None:
        raise ValueError(
            f"{source}: a key has at least {_MIN_LENGTH} printable ASCII characters without "
            f"spaces, got {len(text)} characters; make one: openssl rand -hex 32"
        )
    return ApiKey(text)


def hand_over(key: ApiKey | None, process: subprocess.Popen[bytes]) -> None:
    """Write the key to the standard input of a process, and close it; nothing without a key."""
    assert process.stdin is not None, "the process was started without a pipe"
    # A process that has ended already is noticed, and explained, when its server is waited for.
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        if key is not None:
            pipe.write(f"{key.secret}\n".encode())


def address_of(host: str, port: int) -> str:
    """Return the URL at which this machine reaches a server that listens on ``host``."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"http://{host}:{port}"
    if address.version == 4:
        return f"http://{'127.0.0.1' if address.is_unspecified else host}:{port}"
    return f"http://[{'::1' if address.is_unspecified else host}]:{port}"
