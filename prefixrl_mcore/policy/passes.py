"""Passes of packed batches through the model chunks of this rank."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from megatron.core.distributed import DistributedDataParallel

from prefixrl_mcore.config.policy import LossConfig
from prefixrl_mcore.data.packing import PackedBatch
from prefixrl_mcore.policy import router
from prefixrl_mcore.policy.compute_clock import ComputeClock
from prefixrl_mcore.policy.forward_backward import (
    RowReport,
    Totals,
    gather_row_reports,
    policy_loss,
    reduce_totals,
    row_report,
    run_schedule,
)
from prefixrl_mcore.policy.microbatch import (
    Microbatch,
    StreamSettings,
    build_microbatch,
    count_real_tokens,
)
from prefixrl_mcore.policy.reference import FrozenReference
from prefixrl_mcore.policy.topology import Topology


class Passes:
    """Runs batches through the model; every rank must call its methods together."""

    def __init__(
        self,
        model_chunks: Sequence[DistributedDataParallel],
        settings: StreamSettings,
        topology: Topology,
        *,
        on_microbatch: Callable[[], None],
    ) -> None:
        """Take the chunks of a model, whose reduction of gradients is watched from now on.

        Args:
            model_chunks: this rank's chunks.
            settings: how streams become microbatches.
            topology: this rank's place.
            on_microbatch: called when a chunk begins with a microbatch.
        """
        self._model_chunks = model_chunks
        self._settings = settings
        self._topology = topology
        self._on_microbatch = on_microbatch
        self.clock = ComputeClock(topology.device)
        """Time of the last loss pass until its gradients were reduced."""
        self.reference: FrozenReference | None = None
        """Weights of the KL term's reference; None without one."""
        self._watch_reduction()

    def run_loss(
        self,
        batch: PackedBatch,
        loss: LossConfig,
        *,
        forward_only: bool,
        reference: Sequence[np.ndarray] | None = None,
    ) -> Totals:
        """Run the loss over the batch; leaves gradients unless ``forward_only``.

        Routers of a mixture forget what they have counted, and count this pass.

        Args:
            batch: packed for this layout.
            loss: estimator.
            forward_only: no backward pass.
            reference: what ``reference_logprobs`` returned; needed by a KL term.
        """
        has_reference = loss.kl != "none"
        microbatches = self._microbatches(batch, loss, reference)
        if self._settings.has_experts:
            loss_scale = batch.num_trained_tokens / count_real_tokens(batch.streams)
            router.begin_update(self._model_chunks, loss_scale=loss_scale)
        self.clock.start()
        reports = run_schedule(
            self._model_chunks,
            microbatches,
            partial(
                policy_loss,
                has_rollout_logprobs=batch.has_rollout_logprobs,
                has_reference=has_reference,
            ),
            forward_only=forward_only,
            on_microbatch=self._on_microbatch,
        )
        self.clock.stop()  # here when there was no gradient to reduce
        return reduce_totals(
            reports,
            self._topology,
            has_rollout_logprobs=batch.has_rollout_logprobs,
            has_reference=has_reference,
        )

    def reference_logprobs(self, batch: PackedBatch) -> list[np.ndarray] | None:
        """Return the reference's logprobs of this rank's rows, by microbatch.

        None on pipeline stages without the head.

        Raises:
            ValueError: if there is no reference.
        """
        if self.reference is None:
            raise ValueError(
                "a loss with a KL term needs the policy to be built with one: loss.kl was 'none'"
            )
        with self.reference.in_place():
            reports = run_schedule(
                self._model_chunks,
                self._microbatches(batch, None),
                row_report,
                forward_only=True,
                on_microbatch=self._on_microbatch,
            )
        return [logprobs_R for logprobs_R, _ in reports] or None

    def row_statistics(self, batch: PackedBatch) -> list[RowReport]:
        """Return each stream's (logprobs_R, entropies_R), float32, nats, under current weights.

        No gradient. Every rank gets every stream, in the order of ``batch.streams``.
        """
        reports = run_schedule(
            self._model_chunks, self._microbatches(batch, None), row_report, forward_only=True
        )
        return gather_row_reports(
            reports, self._topology, streams=batch.streams, settings=self._settings
        )

    def _watch_reduction(self) -> None:
        """Let the clock know when Megatron's schedule goes on to reduce gradients."""
        config = self._model_chunks[0].config
        assert config.finalize_model_grads_func is not None, "set by build_transformer_config"
        config.finalize_model_grads_func = self.clock.stopping_before(
            config.finalize_model_grads_func
        )

    def _microbatches(
        self,
        batch: PackedBatch,
        loss: LossConfig | None,
        reference: Sequence[np.ndarray] | None = None,
    ) -> list[Microbatch]:
        """Return this data-parallel rank's streams as tensors; without a loss, to be scored."""
        streams = batch.rank_streams(self._topology.dp_rank)
        return [
            build_microbatch(
                stream,
                self._settings,
                loss=loss,
                has_rollout_logprobs=batch.has_rollout_logprobs,
                reference_logprobs_R=None if reference is None else reference[index],
            )
            for index, stream in enumerate(streams)
        ]
