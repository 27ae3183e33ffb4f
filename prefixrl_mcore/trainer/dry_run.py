"""The dry-run step: one pass at the largest shape before step 0, so that memory runs out first."""

import logging
import time

import numpy as np

from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.records import TrainingSequence
from prefixrl_mcore.trainer.memory import highest_peak, reset_peaks
from prefixrl_mcore.trainer.out_of_memory import describe_batch, describe_bytes, explained
from prefixrl_mcore.trainer.session import Session

logger = logging.getLogger(__name__)

_LOGPROB = -1.0  # nats: any finite value makes the loss compute what it would


def is_wanted(session: Session) -> bool:
    """Return whether this run takes a dry-run step: as configured, by default on GPUs."""
    wanted = session.config.trainer.dry_run_step
    return session.topology.device.type == "cuda" if wanted is None else wanted


def take_dry_run_step(session: Session) -> None:
    """Run forward and backward on the largest batch; all ranks call this.

    The policy is bit for bit as before; what a first step would allocate is allocated. The
    optimizer's own temporaries are not met, nor experts that get more tokens than others.

    Raises:
        TrainerMemoryError: if memory runs out, with the settings to turn.
    """
    session.progress.update(waiting_for="dry-run step")
    sequences = largest_sequences(session.config, vocab_size=session.policy.shape.vocab_size)
    batch = session.pack_sequences(sequences, aggregation="token_mean")
    start = time.perf_counter()
    with explained(
        session.config,
        session.topology,
        what=lambda: "the dry-run step before step 0",
        batch=batch,
        predicted_bytes=session.predicted_bytes,
        snapshots=session.folder.profile,
    ):
        session.policy.dry_run(batch)
    seconds = time.perf_counter() - start
    rank, peak = highest_peak(session.topology)
    reset_peaks(session.topology.device)
    logger.info(
        "dry-run step: %s; %.1f s; peak memory %s on rank %d%s",
        describe_batch(batch),
        seconds,
        describe_bytes(peak),
        rank,
        ""
        if session.predicted_bytes is None
        else f", {describe_bytes(session.predicted_bytes)} predicted",
    )


def largest_sequences(run: RunConfig, *, vocab_size: int) -> list[TrainingSequence]:
    """Return sequences that fill as many streams as a step can have in flight.

    Each stream gets sequences of ``rollout.max_total_tokens`` with the longest completion, and
    one that fills what is left. A rank gets one stream, with pipeline stages one per stage, with
    virtual stages two: the first stage then holds as many as in any larger batch.

    Args:
        run: lengths and layout.
        vocab_size: tokens are drawn from all of it, so that a mixture uses all its experts.
    """
    parallel = run.policy.parallel
    in_flight = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size is not None:
        in_flight *= 2
    generator = np.random.default_rng(0)  # no state of the run is touched
    sequences: list[TrainingSequence] = []
    for stream in range(parallel.data_parallel_size * in_flight):
        for index, length in enumerate(_lengths(run)):
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


def _lengths(run: RunConfig) -> list[int]:
    """Return the lengths of the sequences of one full stream, tokens."""
    multiple = run.policy.parallel.sequence_multiple
    longest = run.rollout.max_total_tokens
    padded = -(-longest // multiple) * multiple
    lengths = [longest] * (run.stream_tokens // padded)
    rest = run.stream_tokens % padded
    return [*lengths, rest] if rest >= max(2, multiple) else lengths
