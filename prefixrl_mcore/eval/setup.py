"""Building what an evaluation needs: prompts, verifier, engine, traces, problem sets."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.data.prompts import PromptRenderer
from prefixrl_mcore.data.traces import TraceStore
from prefixrl_mcore.eval.runner import Evaluator
from prefixrl_mcore.records import Problem, Trace
from prefixrl_mcore.rewards.base import Verifier
from prefixrl_mcore.rewards.build import build_verifier
from prefixrl_mcore.rollout.build import build_engine
from prefixrl_mcore.rollout.engine import SamplingParams
from prefixrl_mcore.rollout.interruption import IsInterrupted, never_interrupted
from prefixrl_mcore.rollout.weight_sync.folder import weights_of_folder

logger = logging.getLogger(__name__)

_SHOWN_COMPLAINTS = 5


@contextmanager
def build_evaluator(
    config: RunConfig,
    *,
    model_folder: Path,
    temperature: float,
    logs_folder: Path,
    problems: Iterable[Problem],
    renderer: PromptRenderer | None = None,
    is_synced: bool = False,
    is_interrupted: IsInterrupted = never_interrupted,
    num_trainer_ranks: int = 0,
) -> Iterator[Evaluator]:
    """Yield an evaluator whose engine serves ``model_folder``; closes engine and verifier.

    Servers that run elsewhere may hold any weights: they are sent the folder's.

    Args:
        config: rollout, reward and prompt settings.
        model_folder: Hugging Face folder with the weights.
        temperature: sampling temperature.
        logs_folder: where the engine logs.
        problems: all problems that will be judged; their answers are checked before the engine
            is started.
        renderer: prompts of the run's tokenizer; None loads it.
        is_synced: the caller loads weights into the engine before it samples.
        is_interrupted: asked often while the engine samples; True ends that.
        num_trainer_ranks: on this machine, one GPU each; 0 where nothing is trained.

    Raises:
        ConfigError: if a reference answer cannot be verified.
    """
    with ExitStack() as stack:
        renderer = renderer or PromptRenderer(config.model.path, config.data.prompt)
        verifier = build_verifier(config.reward)
        stack.callback(verifier.close)
        check_references(list(problems), verifier)
        engine = build_engine(
            config.rollout,
            model_folder=model_folder,
            logits_dtype=config.model.logits_dtype,
            logs_folder=logs_folder,
            is_interrupted=is_interrupted,
            num_trainer_ranks=num_trainer_ranks,
        )
        stack.callback(engine.close)
        if config.rollout.sglang.urls and not is_synced:
            engine.load_weights(partial(weights_of_folder, model_folder), engine.policy_version)
        yield Evaluator(
            engine=engine,
            verifier=verifier,
            renderer=renderer,
            params=SamplingParams(
                temperature=temperature,
                max_completion_tokens=config.rollout.max_completion_tokens,
                max_total_tokens=config.rollout.max_total_tokens,
                stop_token_ids=renderer.stop_token_ids,
            ),
            seed=config.seed,
            traces=read_traces(config, renderer),
        )


def read_traces(config: RunConfig, renderer: PromptRenderer) -> dict[str, Trace]:
    """Return problem id → its first trace; empty when there is no trace store."""
    if not TraceStore.is_in(config.traces_folder):
        return {}
    store = TraceStore.open(
        config.traces_folder,
        tokenizer_hash=renderer.tokenizer_hash,
        chat_template_hash=renderer.chat_template_hash,
    )
    return store.first_traces()


def check_references(problems: Sequence[Problem], verifier: Verifier) -> None:
    """Refuse reference answers that the verifier cannot compare with anything.

    Raises:
        ConfigError: naming the problems and what is wrong with their answers.
    """
    complaints = verifier.check_references([problem.answer for problem in problems])
    lines = [
        f"  {problem.problem_id}: answer {problem.answer!r}: {complaint}"
        for problem, complaint in zip(problems, complaints, strict=True)
        if complaint is not None
    ]
    if lines:
        shown = "\n".join(lines[:_SHOWN_COMPLAINTS])
        raise ConfigError(
            f"{len(lines)} of {len(problems)} reference answers cannot be verified:\n{shown}\n"
            "Correct them in the problem file, or see reward.answer_form and data.answer_format."
        )
