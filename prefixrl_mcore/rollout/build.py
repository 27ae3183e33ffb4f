"""Choosing and building the rollout engine of a run."""

import logging
from pathlib import Path

import torch

from prefixrl_mcore.config.policy import LogitsDtype
from prefixrl_mcore.config.rollout import RolloutConfig
from prefixrl_mcore.observability.atomic import write_json_atomic
from prefixrl_mcore.observability.run_folder import ENGINE_FILE
from prefixrl_mcore.rollout.engine import EngineError, RolloutEngine
from prefixrl_mcore.rollout.interruption import IsInterrupted, never_interrupted
from prefixrl_mcore.rollout.sglang.engine import SGLangEngine
from prefixrl_mcore.rollout.sglang.environment import find_interpreter
from prefixrl_mcore.rollout.transformers_engine import TransformersEngine

logger = logging.getLogger(__name__)


def build_engine(
    config: RolloutConfig,
    model_folder: Path,
    *,
    logits_dtype: LogitsDtype,
    logs_folder: Path,
    device: str | None = None,
    is_interrupted: IsInterrupted = never_interrupted,
    num_trainer_ranks: int = 0,
) -> RolloutEngine:
    """Return the engine that ``config.engine`` names, serving a Hugging Face folder.

    With ``engine = None`` SGLang is tried first; where its environment is missing or its server
    does not start, the transformers engine takes its place, and one warning says why. Too few GPUs
    are refused all the same where SGLang is there: whether servers then take turns with the trainer
    (``rollout.colocated``) or the transformers engine samples is to be chosen.

    Args:
        config: the run's rollout section.
        model_folder: weights (version -1), config and tokenizer.
        logits_dtype: precision of a bfloat16 model's logits, as in the trainer's head.
        logs_folder: gets the output of the servers that are started, and ``engine.json``: which
            engine it became, and why SGLang is not used if it fell back.
        device: ``cpu`` or ``cuda``; None takes the GPU where there is one.
        is_interrupted: asked often while the engine samples; True ends that.
        num_trainer_ranks: on this machine, one GPU each; 0 where nothing is trained.

    Raises:
        ValueError: if the folder is not a model's; if trainer and servers need more GPUs than
            there are, with SGLang there; if there are fewer servers than ``min_servers``.
        EngineError: if SGLang was asked for by name and cannot be had.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    fallback_reason: str | None = None
    if config.engine != "transformers":
        config.sglang.check_min_servers(config.sglang.num_members)
        try:
            if not config.sglang.urls:  # before GPUs are counted, which no fallback needs
                find_interpreter(config.sglang.python)
            engine: RolloutEngine = SGLangEngine(
                model_folder,
                config.sglang,
                logits_dtype=logits_dtype,
                max_total_tokens=config.max_total_tokens,
                logs_folder=logs_folder,
                device=device,
                colocated=config.colocated,
                is_interrupted=is_interrupted,
                num_trainer_ranks=num_trainer_ranks,
            )
        except EngineError as error:
            if config.engine == "sglang":
                raise
            fallback_reason = str(error)
            logger.warning(
                "SGLang is not used, the transformers engine takes its place: %s\n"
                'Set rollout.engine = "transformers" to choose it without this warning.',
                error,
            )
        else:
            return _recorded(engine, logs_folder, fallback_reason)
    engine = TransformersEngine(
        model_folder,
        config.transformers,
        logits_dtype=logits_dtype,
        device=device,
        is_interrupted=is_interrupted,
    )
    return _recorded(engine, logs_folder, fallback_reason)


def _recorded(
    engine: RolloutEngine, logs_folder: Path, fallback_reason: str | None
) -> RolloutEngine:
    """Return the engine, once its name is in ``ENGINE_FILE`` for the report."""
    logs_folder.mkdir(parents=True, exist_ok=True)
    record = {"engine": engine.name, "fallback_reason": fallback_reason}
    write_json_atomic(logs_folder / ENGINE_FILE, record)
    return engine
