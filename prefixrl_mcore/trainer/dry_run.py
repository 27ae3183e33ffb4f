"""The dry-run step: passes at the largest shapes before step 0, so that memory runs out first.

No batch has both the longest sequences and the most trained tokens, so that there are two: full
streams of the longest sequences, and full streams of completions after one token of context, most
of them short enough for the padded layout of attention to have as much padding as it admits.
"""

import logging
import math
import time
from collections.abc import Sequence

import numpy as np

from prefixrl_mcore.config.layout import MIN_FILL
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.records import TrainingSequence
from prefixrl_mcore.trainer.memory import highest_peak, reset_peaks
from prefixrl_mcore.trainer.out_of_memory import describe_batch, describe_bytes
from prefixrl_mcore.trainer.session import Session

logger = logging.getLogger(__name__)

_LOGPROB = -1.0  # nats: any finite value makes the loss compute what it would


def is_wanted(session: Session) -> bool:
    """Return whether this run takes a dry-run step: as configured, by default on GPUs."""
    wanted = session.config.trainer.dry_run_step
    return session.topology.device.type == "cuda" if wanted is None else wanted


def take_dry_run_step(session: Session) -> None:
    """Run forward and backward on the largest batches; all ranks call this.

    The policy is as before (``MegatronPolicy.dry_run``); what a first step would allocate is
    allocated. The optimizer's own temporaries are not met, nor experts that get more tokens than
    others, nor more streams than a rank has under way at once (their tokens and rows are small).

    Raises:
        TrainerMemoryError: if memory runs out, with the settings to turn.
    """
    session.progress.update(waiting_for="dry-run step")
    session.release_engine_memory()
    vocab_size = session.policy.shape.vocab_size
    _pass("longest sequences", session, longest_sequences(session.config, vocab_size=vocab_size))
    _pass("most trained tokens", session, most_rows(session.config, vocab_size=vocab_size))
    reset_peaks(session.topology.device)


def _pass(name: str, session: Session, sequences: Sequence[TrainingSequence]) -> None:
    """Run one batch, and log its time and the highest peak of memory so far."""
    batch = session.pack_sequences(sequences, aggregation="token_mean")
    start = time.perf_counter()
    what = f"the dry-run step before step 0 ({name})"
    with session.memory_explained(what=what, batch=batch):
        session.policy.dry_run(batch)
    seconds = time.perf_counter() - start
    rank, peak = highest_peak(session.topology)
    logger.info(
        "dry-run step, %s: %s; %.1f s; peak memory so far %s on rank %d%s",
        name,
        describe_batch(batch),
        seconds,
        describe_bytes(peak),
        rank,
        ""
        if session.predicted_bytes is None
        else f", {describe_bytes(session.predicted_bytes)} predicted",
    )


def longest_sequences(run: RunConfig, *, vocab_size: int) -> list[TrainingSequence]:
    """Return sequences of ``rollout.max_total_tokens`` with the longest completions, see ``_fill``.

    Args:
        run: lengths and layout.
        vocab_size: tokens are drawn from all of it, so that a mixture uses all its experts.
    """
    longest = run.rollout.max_total_tokens
    return _fill(run, (longest, longest), vocab_size=vocab_size)


def most_rows(run: RunConfig, *, vocab_size: int) -> list[TrainingSequence]:
    """Return sequences that are all completion but for one token of context, see ``_fill``.

    A stream's first is as long as that can be, the others as short as a padded batch pads to it:
    attention then computes on the most slots for its tokens.

    Args:
        run: lengths and layout.
        vocab_size: as for ``longest_sequences``.
    """
    longest = min(run.rollout.max_total_tokens, 1 + run.rollout.max_completion_tokens)
    return _fill(run, (longest, math.ceil(longest * MIN_FILL)), vocab_size=vocab_size)


def _fill(run: RunConfig, lengths: tuple[int, int], *, vocab_size: int) -> list[TrainingSequence]:
    """Return sequences that fill as many streams as a step can have in flight.

    Each stream gets one sequence of the first length, as many as fit of the second, and one that
    fills what is left, with completions as long as allowed. A rank gets one stream, with pipeline
    stages one per stage, with virtual stages two: the first stage then holds as many as in any
    larger batch.
    """
    parallel = run.policy.parallel
    in_flight = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size is not None:
        in_flight *= 2
    generator = np.random.default_rng(0)  # no state of the run is touched
    sequences: list[TrainingSequence] = []
    for stream in range(parallel.data_parallel_size * in_flight):
        for index, length in enumerate(_lengths_in_stream(run, *lengths)):
            num_completion = min(run.rollout.max_completion_tokens, length - 1)
            tokens = tuple(generator.integers(0, vocab_size, length).tolist())
            sequences.append(
                TrainingSequence(
                    sequence_id=f"dry-run/{stream}/{index}",
                    group_index=stream,
                    context_token_ids=tokens[:-num_completion],
                    completion_token_ids=tokens[-num_completion:],
                    advantage=1.0,
                    rollout_logprobs=(_LOGPROB,) * num_completion,
                )
            )
    return sequences


def _lengths_in_stream(run: RunConfig, first: int, others: int) -> list[int]:
    """Return the lengths of the sequences of one full stream, tokens."""
    multiple = run.policy.parallel.sequence_multiple
    rest = run.stream_tokens - -(-first // multiple) * multiple
    num_others, rest = divmod(rest, -(-others // multiple) * multiple)
    lengths = [first, *[others] * num_others]
    return [*lengths, rest] if rest >= max(2, multiple) else lengths
