"""The verifier of a run: the class that ``reward.verifier`` names, found before it is needed."""

import importlib
import math
from collections.abc import Callable, Sequence

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.reward import RewardConfig
from prefixrl_mcore.records import Verdict
from prefixrl_mcore.rewards.base import Verifier, VerifyRequest

_MEMBERS = tuple(name for name in vars(Verifier) if not name.startswith("_"))


def build_verifier(config: RewardConfig) -> Verifier:
    """Return a new verifier; the caller closes it.

    Raises:
        ConfigError: as ``find_verifier``.
    """
    return find_verifier(config)(config)


def find_verifier(config: RewardConfig) -> Callable[[RewardConfig], Verifier]:
    """Import and return the verifier's class; nothing of it is run.

    Raises:
        ConfigError: if the module cannot be imported, or has no such class, or the class lacks
            members of ``Verifier``.
    """
    where = f"reward.verifier = {config.verifier!r}"
    module_name, _, class_name = config.verifier.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything; the cause is kept
        raise ConfigError(
            f"{where}: importing {module_name} raised {type(error).__name__}: {error}; install it "
            "in the trainer's environment, or put its folder on PYTHONPATH"
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise ConfigError(f"{where}: {module.__file__} has no class {class_name}; correct the name")
    missing = [name for name in _MEMBERS if not hasattr(found, name)]
    if missing:
        raise ConfigError(
            f"{where}: the class lacks {', '.join(missing)}; a verifier has "
            f"{', '.join(_MEMBERS)} (docs/rewards.md)"
        )
    return found


def verify(verifier: Verifier, requests: Sequence[VerifyRequest]) -> list[Verdict]:
    """Return the verifier's verdicts, one per request, in order.

    Raises:
        RuntimeError: if the verifier returned another number of verdicts, or a reward that is not
            between 0 and 1: its fault, whatever the completions contain.
    """
    verdicts = verifier.verify(requests)
    if len(verdicts) != len(requests):
        raise RuntimeError(
            f"verifier {verifier.name}: {len(verdicts)} verdicts for {len(requests)} requests; "
            "verify() must return one per request, in order"
        )
    for request, verdict in zip(requests, verdicts, strict=True):
        # Also what is not a number; below 0, a wrong answer would pass for a rewarded one.
        if not (math.isfinite(verdict.reward) and 0.0 <= verdict.reward <= 1.0):
            raise RuntimeError(
                f"verifier {verifier.name}, {request.request_id}: reward {verdict.reward}; "
                "expected 0 for a wrong answer, and up to 1 for a right one"
            )
    return verdicts
