"""Equal seeds and weights give equal completions: what a server and a request need for that."""

import hashlib
from collections.abc import Mapping
from typing import Any

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError

DETERMINISTIC_INFERENCE = "--enable-deterministic-inference"


def deterministic_flags(config: SGLangConfig, *, device: str) -> list[str]:
    """Return the flags that make a server on ``device`` deterministic, if the config asks for it.

    On a GPU SGLang then takes kernels whose results do not depend on the batch. There are none for
    a CPU, whose matrix products do depend on it in the last bits: there the server computes one
    completion at a time, the whole of it, so that nothing else is ever in its batch.
    """
    if not config.deterministic:
        return []
    alone = ["--max-running-requests", "1", "--disable-radix-cache"] if device == "cpu" else []
    return [DETERMINISTIC_INFERENCE, *alone]


def check_determinism(server_info: Mapping[str, Any], config: SGLangConfig) -> None:
    """Refuse a server that runs elsewhere and is not deterministic, where the config asks for it.

    Args:
        server_info: the server's arguments, as it reports them.
        config: the engine's settings.

    Raises:
        EngineError: if so.
    """
    if config.deterministic and not server_info.get("enable_deterministic_inference"):
        raise EngineError(
            "SGLang: rollout.sglang.deterministic is set, and the server is not; start it with "
            f"{DETERMINISTIC_INFERENCE}, or leave the setting out"
        )


def sample_seeds(seed: int, num_samples: int) -> list[int]:
    """Return a seed in [0, 2**63) for each sample of a request.

    SGLang draws token t from (seed of the sample, t) alone, and gives all n samples of one request
    the seed of the request: with n above 1 they would be n times the same.
    """
    return [_seed(seed, index) for index in range(num_samples)]


def _seed(seed: int, index: int) -> int:
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
