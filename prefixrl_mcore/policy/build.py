"""Construction of the Megatron model, its optimizer and its schedule; nothing else builds them.

``GPTModel`` is used because it has the ``output_processor`` hook (see ``head.py``). The layers
are those that ``layers.py`` has chosen: Megatron's local ones with our attention and norm, on CPU
and GPU alike, or Transformer Engine's; the rotary embedding is ours in both.
"""

import logging

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import random
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from prefixrl_mcore.config.policy import OptimizerConfig, PolicyConfig
from prefixrl_mcore.policy import cpu_runtime
from prefixrl_mcore.policy.attention import PackedCausalAttention
from prefixrl_mcore.policy.experts import build_mixture
from prefixrl_mcore.policy.layers import Layers
from prefixrl_mcore.policy.model_config import ModelShape, build_transformer_config
from prefixrl_mcore.policy.norm import RmsNorm
from prefixrl_mcore.policy.packed import PackedRotaryEmbedding
from prefixrl_mcore.policy.te_attention import PackedTransformerEngineAttention
from prefixrl_mcore.policy.topology import Topology

logger = logging.getLogger(__name__)

_STATE_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8": torch.uint8,  # so Transformer Engine calls its scaled eight-bit state
}
"""Types of optimizer state, by their names in the config."""


@cpu_runtime.megatron_on_cpu()
def build_model_chunks(
    shape: ModelShape, policy: PolicyConfig, layers: Layers, topology: Topology
) -> list[DistributedDataParallel]:
    """Return this rank's model chunks, wrapped for data parallelism, with random weights.

    One chunk, or one per virtual pipeline stage. All ranks must call this.

    Args:
        shape: what to build.
        policy: precision, layout and optimizer sharding.
        layers: whose layers.
        topology: this rank's place; ``topology.initialize`` has been called.
    """
    config = build_transformer_config(shape, policy, layers, device=topology.device)
    padded_vocab_size = shape.padded_vocab_size(topology.tp_size)
    num_chunks = policy.parallel.virtual_pipeline_model_parallel_size
    stages: list[int | None] = list(range(num_chunks)) if num_chunks else [None]
    if "layernorm" in (config.recompute_modules or ()):
        _let_norms_be_recomputed()
    chunks = [
        _build_gpt(shape, config, layers, padded_vocab_size, vp_stage=stage) for stage in stages
    ]
    for chunk in chunks:
        chunk.to(topology.device)
    modules = [Float16Module(config, chunk) if config.bf16 else chunk for chunk in chunks]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=policy.optimizer.use_distributed_optimizer,
        overlap_grad_reduce=False,
    )
    # The head reads the output weight as a tensor; the wait for a gathered one is in a pre-hook of
    # its module, which is then not called.
    assert not ddp_config.overlap_param_gather, "the head would read weights under way"
    wrapped = [
        DistributedDataParallel(config, ddp_config, module, disable_bucketing=index > 0)
        for index, module in enumerate(modules)
    ]
    no_sync = [chunk.no_sync for chunk in wrapped]
    # The interleaved schedule takes one function per chunk, which the declared type leaves out.
    setattr(config, "no_sync_func", no_sync if num_chunks else no_sync[0])  # noqa: B010
    num_parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    logger.info("built %s: %d parameters on this rank", shape.architecture, num_parameters)
    return wrapped


def unwrap(chunk: torch.nn.Module) -> GPTModel:
    """Return the GPTModel inside the data-parallel and precision wrappers."""
    while not isinstance(chunk, GPTModel):
        inner = getattr(chunk, "module", None)
        if not isinstance(inner, torch.nn.Module):
            raise TypeError(f"unwrap: no GPTModel inside {type(chunk).__name__}")
        chunk = inner
    return chunk


@cpu_runtime.megatron_on_cpu()
def build_optimizer(
    chunks: list[DistributedDataParallel], policy: PolicyConfig, *, lr: float
) -> MegatronOptimizer:
    """Return AdamW over ``chunks`` with empty moments.

    Matrices have weight decay; norms and biases have none. State is float32 unless the
    precision-aware optimizer keeps it in other types. All ranks must call this.
    """
    optimizer = policy.optimizer
    is_bf16 = policy.dtype == "bfloat16"
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=min(optimizer.min_lr, lr),
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        bf16=is_bf16,
        params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
        use_precision_aware_optimizer=optimizer.use_precision_aware_optimizer,
        main_params_dtype=_STATE_DTYPES[optimizer.main_params_dtype],
        exp_avg_dtype=_STATE_DTYPES[optimizer.exp_avg_dtype],
        exp_avg_sq_dtype=_STATE_DTYPES[optimizer.exp_avg_sq_dtype],
        optimizer_cpu_offload=optimizer.cpu_offload,
        optimizer_offload_fraction=optimizer.cpu_offload_fraction if optimizer.cpu_offload else 0.0,
    )
    megatron_chunks: list[MegatronModule] = [*chunks]
    return get_megatron_optimizer(config, megatron_chunks)


def build_scheduler(
    optimizer: MegatronOptimizer, config: OptimizerConfig, *, lr: float, num_steps: int
) -> OptimizerParamScheduler:
    """Return the learning-rate schedule; its step count is the number of optimizer steps taken.

    Warm-up of ``w`` steps gives ``lr * k / (w + 1)`` at the k-th step (k from 1), so that the
    first step is not lost to a rate of zero. After it, ``constant`` stays, ``cosine`` and
    ``linear`` fall towards ``min_lr``, which would be reached at step ``num_steps + 1``. ``wsd``
    stays at the peak and falls as they do, within the last ``decay_fraction`` of the steps.

    Args:
        optimizer: its parameter groups get learning rate and weight decay.
        config: shape of the schedule.
        lr: peak learning rate (``config.lr`` is not read, so that phases can differ).
        num_steps: optimizer steps of the phase (reinforcement learning, or the supervised one).

    Raises:
        ValueError: if the schedule does not fit into the phase, as ``check_phase`` says.
    """
    config.check_phase(lr=lr, num_steps=num_steps)
    warmup = config.num_warmup_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=lr / (warmup + 1),
        max_lr=lr,
        min_lr=min(config.min_lr, lr),
        lr_warmup_steps=warmup,
        lr_decay_steps=max(num_steps, warmup + 1),
        lr_decay_style="WSD" if config.schedule == "wsd" else config.schedule,
        wsd_decay_steps=config.num_decay_steps(num_steps),
        lr_wsd_decay_style=config.decay_shape,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=max(num_steps, 1),
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def _build_gpt(
    shape: ModelShape,
    config: TransformerConfig,
    layers: Layers,
    padded_vocab_size: int,
    *,
    vp_stage: int | None,
) -> GPTModel:
    """Return one pipeline chunk."""
    model = GPTModel(
        config=config,
        transformer_layer_spec=_block_spec(config, layers, vp_stage),  # pyright: ignore[reportArgumentType]  # declared narrower than TransformerBlock takes
        vocab_size=padded_vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        post_process=parallel_state.is_pipeline_last_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,  # pyright: ignore[reportArgumentType]  # declared int, used as a number
        vp_stage=vp_stage,
    )
    model.rotary_pos_emb = PackedRotaryEmbedding(
        kv_channels=shape.kv_channels,
        rotary_percent=1.0,
        rotary_base=shape.rotary_base,  # pyright: ignore[reportArgumentType]  # as above
        scaling=shape.rotary_scaling,
        use_cpu_initialization=config.use_cpu_initialization,
    )
    if layers.spec == "transformer_engine" and layers.fuses_weight_gradients:
        _fuse_weight_gradients(model)
    return model


def _fuse_weight_gradients(model: GPTModel) -> None:
    """Let Transformer Engine's layers add weight gradients to ``main_grad`` themselves.

    Megatron's own switch would ask apex's kernel of the output layer too, which is Megatron's
    whatever the spec (and whose gradient our head writes).
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            setattr(module, "fuse_wgrad_accumulation", True)  # noqa: B010  (not declared)


def _let_norms_be_recomputed() -> None:
    """Repair two things of megatron-core 0.19.2.

    Without Transformer Engine, ``CheckpointWithoutOutput(fp8=False)`` takes FP8 for on (it asks
    ``fp8 is not None``) and calls it. And a C++ extension, which lets a tensor share the
    recomputed storage, is compiled in the first backward pass: that needs a compiler, and waits
    for ever for the lock of a killed process. A copy takes its place.
    """
    if not HAVE_TE:
        random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
    random._get_share_storage = lambda: _refill_storage


def _refill_storage(released: Tensor, recomputed: Tensor) -> None:
    """Give a tensor, and all its views, the data that it had before its storage was emptied."""
    source = recomputed.untyped_storage()
    released.untyped_storage().resize_(source.nbytes())
    released.untyped_storage().copy_(source)


def _block_spec(
    config: TransformerConfig, layers: Layers, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return the layers of one chunk."""
    is_local = layers.spec == "local"
    submodules = _local_submodules(config) if is_local else _te_submodules(config)
    layer = ModuleSpec(module=TransformerLayer, submodules=submodules)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * num_layers, layer_norm=RmsNorm if is_local else TENorm
    )


def _attention_of(submodules: TransformerLayerSubmodules) -> SelfAttentionSubmodules:
    """Return the parts of the attention of Megatron's spec."""
    self_attention = submodules.self_attention
    assert isinstance(self_attention, ModuleSpec), "megatron's spec"
    assert isinstance(self_attention.submodules, SelfAttentionSubmodules), "megatron's spec"
    return self_attention.submodules


def _te_submodules(config: TransformerConfig) -> TransformerLayerSubmodules:
    """Return Transformer Engine's layer with its attention over our streams.

    Norms are fused into the matrix products behind them. Where that changes a weight's name,
    Megatron's map stores it under one name for both specs; the norm before a mixture of experts
    is missing in it.
    """
    submodules = get_gpt_layer_with_transformer_engine_submodules(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    _attention_of(submodules).core_attention = PackedTransformerEngineAttention
    if config.num_moe_experts:
        submodules.mlp = build_mixture(config, TESpecProvider())
        submodules.sharded_state_dict_keys_map = {
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"
        }
    return submodules


def _local_submodules(config: TransformerConfig) -> TransformerLayerSubmodules:
    """Return Megatron's local layer with our attention and norm."""
    submodules = get_gpt_layer_local_submodules(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    if config.num_moe_experts:
        submodules.mlp = build_mixture(config, LocalSpecProvider())
    submodules.input_layernorm = RmsNorm
    submodules.pre_mlp_layernorm = RmsNorm
    attention = _attention_of(submodules)
    attention.core_attention = PackedCausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = RmsNorm
        attention.k_layernorm = RmsNorm
    return submodules
