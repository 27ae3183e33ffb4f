"""The trained policy: a Megatron model, its optimizer, and one update per packed batch."""

import gc
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from prefixrl_mcore.accounting.model_flops import ModelFlops
from prefixrl_mcore.checkpoint.convert.hf_folder import read_assets
from prefixrl_mcore.checkpoint.convert.live_export import export_hf_weights
from prefixrl_mcore.checkpoint.convert.live_load import load_hf_weights
from prefixrl_mcore.checkpoint.megatron_state import complete_optimizer_state
from prefixrl_mcore.checkpoint.random_states import get_rng_state, set_rng_state
from prefixrl_mcore.config.layout import check_stream
from prefixrl_mcore.config.model_shape import check_reference
from prefixrl_mcore.config.policy import LogitsDtype, LossConfig, PolicyConfig
from prefixrl_mcore.config.precision import check_precision
from prefixrl_mcore.data.packing import PackedBatch
from prefixrl_mcore.observability.phases import Phases
from prefixrl_mcore.policy import cpu_runtime, router, topology
from prefixrl_mcore.policy.build import build_model_chunks, build_optimizer, build_scheduler
from prefixrl_mcore.policy.compute_clock import wait_for_device
from prefixrl_mcore.policy.forward_backward import Totals
from prefixrl_mcore.policy.head import HeadSettings
from prefixrl_mcore.policy.layers import (
    check_equal_layers,
    choose_layers,
    describe_machine,
    log_layers,
)
from prefixrl_mcore.policy.microbatch import (
    StreamSettings,
    check_batch,
    count_real_tokens,
    count_work,
)
from prefixrl_mcore.policy.model_config import ModelShape, read_hf_config, read_model_shape
from prefixrl_mcore.policy.nonfinite import Findings, NonFiniteError, find_culprits
from prefixrl_mcore.policy.passes import Passes
from prefixrl_mcore.policy.reference import FrozenReference
from prefixrl_mcore.records import UpdateResult

logger = logging.getLogger(__name__)


class MegatronPolicy:
    """The weights being trained, and everything that changes them.

    All methods are collective: every rank calls them in the same order with equal arguments.
    """

    def __init__(
        self,
        *,
        hf_config: Mapping[str, Any],
        policy: PolicyConfig,
        loss: LossConfig,
        stream_tokens: int,
        temperature: float,
        num_steps: int,
        seed: int,
        logits_dtype: LogitsDtype = "float32",
    ) -> None:
        """Build the model with random weights, its optimizer and its schedule.

        Args:
            hf_config: parsed Hugging Face ``config.json``.
            policy: precision, layout, optimizer.
            loss: estimator; one with a KL term needs ``build``, which makes the reference.
            stream_tokens: length of every stream, tokens.
            temperature: sampling temperature that logprobs are computed at.
            num_steps: optimizer steps that the schedule covers.
            seed: seed of the random weights.
            logits_dtype: precision of a bfloat16 model's logits; the engine's must be the same.

        Raises:
            ValueError: if the model is not supported or the layout does not fit.
        """
        check_stream(policy.parallel, stream_tokens)
        self.shape: ModelShape = read_model_shape(hf_config)
        check_precision(self.shape, policy, stream_tokens)
        self.layers = choose_layers(policy, self.shape, describe_machine())
        log_layers(self.layers)
        self.topology = topology.initialize(policy.parallel, seed=seed)
        check_equal_layers(topology.gather_objects(self.layers))
        self.hf_config = dict(hf_config)
        self.model_path: Path | None = None
        """Folder that the weights came from."""
        self.model_files: Mapping[str, bytes] = {}
        """Its config and tokenizer files as they were then, for checkpoints; of rank 0 alone."""
        self.stream_tokens = stream_tokens
        self.seed = seed
        """Seed of random weights and random states."""
        self.policy_version = 0
        """Optimizer steps applied to the weights."""
        self.phases = Phases()
        """Told of the phases of an update; a trainer puts its own here."""
        self._policy = policy
        self._loss = loss
        self.stream_settings = self._stream_settings(temperature, logits_dtype)
        torch.manual_seed(seed)
        self.model_chunks: list[DistributedDataParallel] = build_model_chunks(
            self.shape, policy, self.layers, self.topology
        )
        self._passes = Passes(
            self.model_chunks,
            self.stream_settings,
            self.topology,
            on_microbatch=lambda: self.phases.beat(),
        )
        self.optimizer: MegatronOptimizer
        self.scheduler: OptimizerParamScheduler
        self.reset_optimizer(policy.optimizer.lr, num_steps=num_steps)

    @classmethod
    def build(
        cls,
        *,
        model_path: Path,
        policy: PolicyConfig,
        loss: LossConfig,
        stream_tokens: int,
        temperature: float,
        num_steps: int,
        seed: int,
        logits_dtype: LogitsDtype = "float32",
    ) -> "MegatronPolicy":
        """Return a policy with the weights of a Hugging Face folder.

        Args:
            model_path: folder with ``config.json`` and safetensors.
            policy: precision, layout, optimizer.
            loss: estimator.
            stream_tokens: length of every stream, tokens.
            temperature: sampling temperature that logprobs are computed at.
            num_steps: optimizer steps that the schedule covers.
            seed: seed of Megatron's random states.
            logits_dtype: precision of a bfloat16 model's logits; the engine's must be the same.

        Raises:
            ValueError: if the model is not supported, the layout does not fit, a folder is
                incomplete, or the reference is another model or not finite.
        """
        hf_config = read_hf_config(model_path)
        model_files: dict[str, bytes] = {}
        topology.run_on_first(lambda: model_files.update(read_assets(model_path)))
        if loss.reference_path is not None:
            check_reference(read_model_shape(hf_config), loss.reference_path)
        built = cls(
            hf_config=hf_config,
            policy=policy,
            loss=loss,
            stream_tokens=stream_tokens,
            temperature=temperature,
            num_steps=num_steps,
            seed=seed,
            logits_dtype=logits_dtype,
        )
        built.model_path = model_path
        built.model_files = model_files
        with cpu_runtime.megatron_on_cpu():
            if loss.kl != "none":
                folder = loss.reference_path or model_path
                load_hf_weights(built.model_chunks, folder, hf_config)
                if topology.any_rank(not built._has_finite_weights()):
                    raise ValueError(
                        f"the reference of loss.kl, {folder}: its weights are not finite; name "
                        "another folder in loss.reference_path"
                    )
                built._passes.reference = FrozenReference(built.model_chunks)
            load_hf_weights(built.model_chunks, model_path, hf_config)
        built.adopt_model_weights()
        return built

    @cpu_runtime.megatron_on_cpu()
    def update(self, batch: PackedBatch, *, loss: LossConfig | None = None) -> UpdateResult:
        """Take one optimizer step on ``batch`` and return what it did.

        A GPU is synchronised where a phase ends. That costs nothing else: the host reads the
        gradient norm right after the passes, and the weights leave for the engine, or the metrics
        are read, right after the step.

        Minimises ``sum_r weights_r * loss_r / num_trained_tokens`` over the global batch. When no
        row can carry a gradient (every advantage zero without an entropy bonus, a KL term or a
        loss of the routers) nothing changes: not the weights, not the moments, not the schedule,
        not ``policy_version``; the metrics are still computed.

        Args:
            batch: equal on every rank, packed for this number of data-parallel ranks.
            loss: estimator of this update (a supervised phase has another); None is the policy's.

        Raises:
            ValueError: if the batch was packed for another layout.
            NonFiniteError: (a ``FloatingPointError``) if loss or gradient is not finite; raised on
                every rank, before the optimizer has changed anything. ``find_nonfinite`` tells
                what made it.
        """
        check_batch(batch, self._policy.parallel, stream_tokens=self.stream_tokens)
        loss = loss or self._loss
        learning_rate = self.learning_rate
        is_skipped = not self._has_gradient(batch, loss)
        self._zero_gradients()
        totals, forward_backward_seconds = self._run_loss(batch, loss, forward_only=is_skipped)
        balance = self._balance_metrics(batch)
        self._check_finite("loss", totals.loss)
        gradient_norm, optimizer_seconds = 0.0, 0.0
        if not is_skipped:
            start = time.perf_counter()
            with self.phases.phase("optimizer"):
                gradient_norm = self._gradient_norm()
            self._check_finite("gradient norm", gradient_norm)
            with self.phases.phase("optimizer"):
                self._apply_gradients()
                wait_for_device(self.topology.device)
            optimizer_seconds = time.perf_counter() - start
        work, flops = count_work(batch.streams, self.stream_settings), ModelFlops.of(self.shape)
        return UpdateResult(
            loss=totals.loss / batch.num_trained_tokens,
            gradient_norm=gradient_norm,
            learning_rate=learning_rate,
            num_trained_tokens=batch.num_trained_tokens,
            num_computed_tokens=work.num_tokens,
            model_flops=flops.forward(work) if is_skipped else flops.forward_backward(work),
            forward_backward_seconds=forward_backward_seconds,
            compute_seconds=self._passes.clock.seconds(),
            optimizer_seconds=optimizer_seconds,
            was_skipped=is_skipped,
            metrics=_mean_metrics(totals, batch.num_trained_tokens) | balance,
        )

    @cpu_runtime.megatron_on_cpu()
    def find_nonfinite(self, batch: PackedBatch, *, loss: LossConfig | None = None) -> Findings:
        """Return what made the update of a batch non-finite; changes nothing.

        Takes up to 64 forward-backward passes over ever smaller parts of the batch.

        Args:
            batch: what ``update`` refused.
            loss: estimator of that update; None is the policy's.
        """
        if topology.any_rank(not self._has_finite_weights()):
            return Findings(has_finite_weights=False)
        findings = find_culprits(
            batch,
            lambda part: self._is_finite(part, loss or self._loss),
            microbatch_multiple=self._policy.parallel.microbatch_multiple,
        )
        self._zero_gradients()
        return findings

    @cpu_runtime.megatron_on_cpu()
    def dry_run(self, batch: PackedBatch) -> None:
        """Run forward and backward on ``batch`` with the optimizer's state allocated; for memory.

        Weights, moments, schedule, random states and ``policy_version`` are bit for bit as before
        (moments that did not exist are zero, as the first step would make them); gradients are
        cleared. With ``fp8_recipe = "delayed"`` alone the scales have seen the batch: Transformer
        Engine keeps their history itself, and the first steps replace it.

        Raises:
            ValueError: if the batch was packed for another layout.
        """
        check_batch(batch, self._policy.parallel, stream_tokens=self.stream_tokens)
        random_states = get_rng_state()
        complete_optimizer_state(self.optimizer)
        self._zero_gradients()
        self._run_loss(batch, self._loss, forward_only=False)
        with self.phases.phase("optimizer"):
            self._gradient_norm()
        self._zero_gradients()
        wait_for_device(self.topology.device)
        set_rng_state(random_states)

    @cpu_runtime.megatron_on_cpu()
    def row_statistics(self, batch: PackedBatch) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return each stream's (logprobs_R, entropies_R), float32, nats, under current weights.

        No gradient. Every rank gets every stream, in the order of ``batch.streams``.

        Raises:
            ValueError: if the batch was packed for another layout.
        """
        self._check_batch(batch)
        return self._passes.row_statistics(batch)

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, full tensor) of every weight on rank 0, nothing elsewhere.

        All ranks must exhaust the iterator together.
        """
        return export_hf_weights(self.model_chunks, self.hf_config)

    def reset_optimizer(self, lr: float, *, num_steps: int) -> None:
        """Start the optimizer anew: empty moments, schedule at its beginning.

        Weights and ``policy_version`` stay. The old optimizer is gone before the new one is built:
        a rank need not have room for both.

        Args:
            lr: peak learning rate of the phase that begins.
            num_steps: optimizer steps of that phase, which the schedule covers.

        Raises:
            ValueError: if the schedule does not fit into the phase.
        """
        if hasattr(self, "optimizer"):
            del self.optimizer, self.scheduler
            gc.collect()  # Megatron's optimizers are part of reference cycles
            if self.topology.device.type == "cuda":
                torch.cuda.empty_cache()
        self.optimizer = build_optimizer(self.model_chunks, self._policy, lr=lr)
        self.scheduler = build_scheduler(
            self.optimizer, self._policy.optimizer, lr=lr, num_steps=num_steps
        )

    @cpu_runtime.megatron_on_cpu()
    def adopt_model_weights(self) -> None:
        """Make the optimizer start from the model's weights; call after writing weights.

        A bfloat16 or sharded optimizer keeps its own float32 copy, which would otherwise undo the
        change at the next step. Also applies the schedule's present learning rate and weight
        decay, which a loaded optimizer state does not carry over.
        """
        self.optimizer.reload_model_params()
        self.scheduler.step(0)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def _stream_settings(self, temperature: float, logits_dtype: LogitsDtype) -> StreamSettings:
        """Return how this layout wants its streams."""
        parallel, head = self._policy.parallel, self._policy.head
        is_rounded = logits_dtype == "bfloat16" and self._policy.dtype == "bfloat16"
        return StreamSettings(
            head=HeadSettings(
                temperature=temperature,
                true_vocab_size=self.shape.vocab_size,
                logits_dtype=torch.bfloat16 if is_rounded else torch.float32,
                memory_bytes=round(head.memory_gb * 1e9),
                backend=head.backend or "auto",
            ),
            is_static=parallel.pipeline_model_parallel_size > 1,
            multiple=self._policy.stream_multiple,
            padding_length=self.layers.padding_length(parallel.sequence_multiple),
            has_padded_layout=self.layers.attention == "sdpa",
            cp_size=self.topology.cp_size,
            cp_rank=self.topology.cp_rank,
            has_experts=self.shape.mixture is not None,
            device=self.topology.device,
        )

    def _check_batch(self, batch: PackedBatch) -> None:
        """Refuse a batch that was packed for another layout."""
        check_batch(batch, self._policy.parallel, stream_tokens=self.stream_tokens)

    def _has_gradient(self, batch: PackedBatch, loss: LossConfig) -> bool:
        """Return whether any row of the global batch can move the weights."""
        experts = self._policy.experts
        has_router_loss = self.shape.mixture is not None and (
            experts.aux_loss_coefficient or experts.z_loss_coefficient
        )
        if loss.entropy_coefficient or loss.kl_coefficient or has_router_loss:
            return any(np.any(stream.weights_R) for stream in batch.streams)
        return any(np.any(stream.weights_R * stream.advantages_R) for stream in batch.streams)

    def _balance_metrics(self, batch: PackedBatch) -> dict[str, float]:
        """Return how evenly the last pass loaded the experts, if there are any."""
        if self.shape.mixture is None:
            return {}
        return router.balance_metrics(
            self.model_chunks,
            num_layers=self.shape.num_layers,
            num_experts=self.shape.mixture.num_experts,
            num_real_tokens=count_real_tokens(batch.streams),
        )

    def _zero_gradients(self) -> None:
        """Clear the gradient buffers and the parameters' gradients."""
        for chunk in self.model_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _gradient_norm(self) -> float:
        """Return the global norm of the gradients that the last backward pass left."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def _apply_gradients(self) -> None:
        """Clip, and step optimizer and schedule."""
        step_outcome = self.optimizer.step()
        if not step_outcome or not step_outcome[0]:
            raise FloatingPointError(
                f"policy version {self.policy_version}: the optimizer refused the step"
            )
        self.scheduler.step(1)
        self.policy_version += 1

    def _check_finite(self, what: str, value: float) -> None:
        """Refuse to go on with a NaN or an infinity."""
        if math.isfinite(value):
            return
        self._zero_gradients()
        raise NonFiniteError(f"policy version {self.policy_version}: {what} is {value}")

    def _run_loss(
        self, batch: PackedBatch, loss: LossConfig, *, forward_only: bool
    ) -> tuple[Totals, float]:
        """Run the loss, after the reference if it has one; return it with its own seconds."""
        reference = None
        if loss.kl != "none":
            with self.phases.phase("reference"):
                reference = self._passes.reference_logprobs(batch)
        start = time.perf_counter()
        with self.phases.phase("forward_backward"):
            totals = self._passes.run_loss(
                batch, loss, forward_only=forward_only, reference=reference
            )
            wait_for_device(self.topology.device)
        return totals, time.perf_counter() - start

    def _is_finite(self, batch: PackedBatch, loss: LossConfig) -> bool:
        """Return whether loss and gradient of ``batch`` are finite; all ranks must call this."""
        self._zero_gradients()
        totals, _ = self._run_loss(batch, loss, forward_only=False)
        is_finite = math.isfinite(totals.loss) and math.isfinite(self._gradient_norm())
        return not topology.any_rank(not is_finite)

    def _has_finite_weights(self) -> bool:
        """Return whether every weight of this rank is finite."""
        return all(
            bool(torch.isfinite(parameter).all())
            for chunk in self.model_chunks
            for parameter in chunk.parameters()
        )


def _mean_metrics(totals: Totals, num_trained_tokens: int) -> dict[str, float]:
    """Return means over trained tokens, maxima and quantiles."""
    means = {name: value / num_trained_tokens for name, value in totals.metric_sums.items()}
    return means | totals.metric_maxima | totals.metric_quantiles
