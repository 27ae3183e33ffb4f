"""The in-process rollout engine: a ``transformers`` model and a decoding loop of our own.

It runs anywhere and is the fallback where SGLang does not start. All samples of a request share
one computation of its context, and finished rows leave the batch.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from prefixrl_mcore.config.policy import LogitsDtype
from prefixrl_mcore.config.rollout import TransformersConfig
from prefixrl_mcore.records import Completion
from prefixrl_mcore.rollout.collected import Collected
from prefixrl_mcore.rollout.decoding import BatchDecoder, Row
from prefixrl_mcore.rollout.engine import (
    IsEnough,
    OnCompleted,
    SampleRequest,
    SamplingParams,
    WeightStream,
    never_enough,
)
from prefixrl_mcore.rollout.float32_head import use_float32_head
from prefixrl_mcore.rollout.guard import EngineGuard
from prefixrl_mcore.rollout.interruption import (
    IsInterrupted,
    SamplingInterrupted,
    never_interrupted,
)
from prefixrl_mcore.rollout.request_limits import completion_limits
from prefixrl_mcore.rollout.weight_names import WeightCoverage

logger = logging.getLogger(__name__)


class TransformersEngine:
    """Samples in this process, with weights in the config's precision.

    Equal requests with equal seeds give equal completions whatever else is in the batch, up to
    the rounding of matrix products, whose order depends on the batch's size: about one token in a
    million falls on the other side of a rounding error. Equal *calls* give equal completions.
    """

    def __init__(
        self,
        model_folder: Path,
        config: TransformersConfig,
        *,
        logits_dtype: LogitsDtype,
        device: str = "cpu",
        is_interrupted: IsInterrupted = never_interrupted,
    ) -> None:
        """Load the model of a Hugging Face folder.

        Args:
            model_folder: config and weights; the weights have version -1.
            config: batch size and precision of the weights.
            logits_dtype: precision of a bfloat16 model's logits, as in the trainer's head.
            device: ``cpu`` or ``cuda``.
            is_interrupted: asked after each token.

        Raises:
            ValueError: if the folder holds no model, or one with other than full attention; if
                float32 logits are not implemented for its output layer.
        """
        if not (model_folder / "config.json").is_file():
            raise ValueError(
                f"model folder {model_folder}: expected a Hugging Face model, found no config.json"
            )
        transformers.logging.disable_progress_bar()  # it would tear our own progress display
        self._config = config
        self._device = torch.device(device)
        self._model: Any = _load_model(model_folder, getattr(torch, config.dtype))
        self._model.to(self._device).eval()
        _check_full_attention(self._model.config, model_folder)
        if config.dtype == "bfloat16" and logits_dtype == "float32":
            use_float32_head(self._model)
        self._weights, self._tied_names = _weights_by_name(self._model)
        self._policy_version = -1
        self._guard = EngineGuard(lambda: self.name)
        self._is_interrupted = is_interrupted

    @property
    def name(self) -> str:
        """``transformers <version>``."""
        return f"transformers {transformers.__version__}"

    @property
    def is_seeded(self) -> bool:
        """True: every row has random numbers of its own."""
        return True

    @property
    def policy_version(self) -> int:
        """Version of the weights loaded last; ``-1`` for those of the model folder."""
        return self._policy_version

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        on_completed: OnCompleted | None = None,
        is_enough: IsEnough = never_enough,
    ) -> list[list[Completion]]:
        """Return ``num_samples`` completions for each request, in the order of the requests.

        Batches come one after the other, so that requests of later ones have no tokens at all if
        it is enough before their turn. Equal calls abort at the same token.

        Raises:
            ValueError: if a request or ``params`` makes no sense.
            EngineError: if the engine is closed, paused, or without complete weights.
            SamplingInterrupted: if somebody ended it.
        """
        with self._guard.sampling():
            return self._sample(requests, params, on_completed, is_enough)

    def _sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        on_completed: OnCompleted | None,
        is_enough: IsEnough,
    ) -> list[list[Completion]]:
        """Do the work of ``sample``."""
        limits = completion_limits(
            requests,
            params,
            vocab_size=self._model.config.vocab_size,
            max_positions=getattr(self._model.config, "max_position_embeddings", None),
        )
        # Contexts of similar length are neighbours, so that batches hold little padding.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].context_token_ids))
        rows = [
            Row(request=requests[index], sample_index=sample_index, max_new_tokens=limits[index])
            for index in order
            for sample_index in range(requests[index].num_samples)
        ]
        collected = Collected(requests, is_enough, on_completed, self._is_interrupted)
        size, version = self._config.max_batch_size, self._policy_version
        for first in range(0, len(rows), size):
            if collected.is_over():
                break
            batch = rows[first : first + size]
            decoder = BatchDecoder(self._model, batch, params, policy_version=version)
            decoder.run(
                lambda index, one, batch=batch: collected.add(batch[index], one),
                collected.is_over,
            )
        sampled = collected.in_order(policy_version=version)
        if collected.was_interrupted:
            raise SamplingInterrupted.after(requests, sampled)
        return sampled

    @torch.no_grad()
    def load_weights(self, stream: WeightStream, policy_version: int) -> None:
        """Replace all weights; later completions carry ``policy_version``.

        Raises:
            EngineError: if a name is unknown, missing or repeated, or its shape differs; the
                engine then refuses to sample until a complete set is loaded. If completions are
                being sampled; nothing is changed then.
        """
        with self._guard.changing("load weights"), self._guard.replacing_weights():
            shapes = {name: tuple(weight.shape) for name, weight in self._weights.items()}
            coverage = WeightCoverage(shapes=shapes, tied_names=self._tied_names)
            for name, weight in stream():
                if coverage.is_to_load(name, tuple(weight.shape)):
                    self._weights[name].copy_(weight)
            coverage.check_complete()
            self._policy_version = policy_version

    def pause(self) -> None:
        """Refuse to sample until ``resume``.

        Raises:
            EngineError: if the engine is closed, or samples.
        """
        with self._guard.changing("pause"):
            self._guard.pause()

    def resume(self) -> None:
        """Accept requests again.

        Raises:
            EngineError: if the engine is closed, or samples.
        """
        with self._guard.changing("resume"):
            self._guard.resume()

    def sleep(self) -> None:
        """Move the weights to host memory; ``load_weights`` must follow after ``wake``.

        Raises:
            EngineError: if the engine is closed, or samples.
        """
        with self._guard.changing("sleep"):
            self._guard.sleep()
            self._model.to("cpu")
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def wake(self) -> None:
        """Take device memory again.

        Raises:
            EngineError: if the engine is closed, or samples.
        """
        with self._guard.changing("wake"):
            self._model.to(self._device)
            self._weights, self._tied_names = _weights_by_name(self._model)

    def take_metrics(self) -> dict[str, float]:
        """Return nothing: what is measured is in the completions."""
        return {}

    def close(self) -> None:
        """Free the model; safe to call twice."""
        self._guard.close()
        self._model = None
        self._weights = {}


def _weights_by_name(model: nn.Module) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Return name -> weight of everything that is saved, and the second names of tied weights.

    The weights share memory with the model.
    """
    state = _split_fused_experts(model.state_dict())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    return {name: state[name] for name in state if name not in tied}, frozenset(tied)


def _split_fused_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by their names in files: transformers 5 fuses experts in memory only."""
    split: dict[str, Tensor] = {}
    for name, weight in state.items():
        layer, _, kind = name.rpartition(".experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            split[name] = weight
            continue
        for index, expert in enumerate(weight):
            prefix = f"{layer}.experts.{index}."
            if kind == "down_proj":
                split[f"{prefix}down_proj.weight"] = expert
                continue
            gate, up = expert.chunk(2)
            split[f"{prefix}gate_proj.weight"] = gate
            split[f"{prefix}up_proj.weight"] = up
    return split


def _load_model(model_folder: Path, dtype: torch.dtype) -> Any:  # noqa: ANN401  (transformers' classes share no type)
    """Return the folder's model in ``dtype``.

    Raises:
        ValueError: if its weights are missing or damaged.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            model_folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"model folder {model_folder}: its weights cannot be loaded: {error}; restore them"
        ) from error


def _check_full_attention(hf_config: PreTrainedConfig, model_folder: Path) -> None:
    """Refuse layers whose cache is not one slot per token."""
    layer_types = set(getattr(hf_config, "layer_types", None) or ["full_attention"])
    others = sorted(layer_types - {"full_attention"})
    if others:
        raise ValueError(
            f"model folder {model_folder}: the transformers engine samples models with full "
            f"attention in every layer, got layers of type {', '.join(others)}; set "
            'rollout.engine = "sglang"'
        )
