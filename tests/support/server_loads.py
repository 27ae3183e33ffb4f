"""What a real server says it does."""

from typing import Any

import urllib3


def computed_context_tokens(url: str) -> int:
    """Return the context tokens that a server computed since its start; told after each pass."""
    return sum(load["total_prefill_uncached_tokens"] for load in _loads(url))


def is_sampling(url: str) -> bool:
    """Return whether a server samples long completions: told after every 15th token."""
    return any(load["num_running_reqs"] > 0 for load in _loads(url))


def _loads(url: str) -> list[dict[str, Any]]:
    """Return what each scheduler of a server last told of its work."""
    answer = urllib3.request("GET", f"{url}/v1/loads?include=all", timeout=10)
    return answer.json()["loads"]
