"""``python -m tests.support.memory_table``: predicted and measured memory, for ``docs/memory.md``.

Builds real policies, one process for each rank, takes two updates and measures the second one:

* weights, gradients and optimizer state by the bytes of their tensors;
* the working memory of the step (activations, head, gradients under way) as the peak of all other
  tensors. On a CPU ``LiveMemory`` counts them, on a GPU it is ``max_memory_allocated``.

``--write FILE`` replaces the text between the file's marks; ``--json FILE`` writes the figures with
the device's name. On a machine with a GPU, ``GPU_CASES`` run there in one process, with a larger
model.
"""

import argparse
import json
import logging
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from prefixrl_mcore.accounting.memory import StageMemory, Workload, estimate_stages
from prefixrl_mcore.config.model_shape import read_hf_config, read_model_shape
from prefixrl_mcore.config.policy import OptimizerConfig, ParallelConfig, PolicyConfig
from prefixrl_mcore.data.packing import PackedBatch, pack
from prefixrl_mcore.policy import topology
from prefixrl_mcore.policy.policy import MegatronPolicy
from prefixrl_mcore.records import TrainingSequence
from tests.support.layouts import parallel_config
from tests.support.live_memory import LiveMemory
from tests.support.policies import build_policy
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import build_tiny_qwen3, randomize, write_model_folder

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

RESIDENT_TOLERANCE = 0.01
"""Of weights, gradients and optimizer state, relative: the sharded buffers are padded."""

WORKING_TOLERANCE = 0.08
"""Of the working memory, relative: short-lived operands of single operations are not modelled."""

SEQUENCES_PER_STREAM = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryCase:
    """A policy whose memory is predicted and measured."""

    model: Literal["dense", "tied", "mixture", "wide vocabulary"]
    """A key of ``build_models``."""

    name: str
    """The layout in the usual abbreviations."""

    parallel: ParallelConfig
    """The layout."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations."""

    recompute: Literal["none", "selective", "full"] = "none"
    """``policy.recompute``."""

    distributed: bool = False
    """With the distributed optimizer."""

    num_microbatches: int = 2
    """Streams of each data-parallel rank."""

    stream_tokens: int = 1024
    """Tokens of a stream."""

    @property
    def policy(self) -> PolicyConfig:
        """The settings that the prediction reads."""
        return PolicyConfig(
            dtype=self.dtype,
            parallel=self.parallel,
            recompute=self.recompute,
            optimizer=OptimizerConfig(use_distributed_optimizer=self.distributed),
        )

    @property
    def workload(self) -> Workload:
        """The streams: sequences of one length, half of each completion."""
        return Workload(
            stream_tokens=self.stream_tokens,
            stream_rows=self.stream_tokens // 2,
            num_microbatches=self.num_microbatches,
            slots_per_token=1.0,
        )


def _case(model: Any, name: str, **settings: Any) -> MemoryCase:
    """Return a case from a name like ``tp2 sp pp2``."""
    sizes: dict[str, Any] = {}
    for word in name.split():
        sizes["sp" if word == "sp" else word[:-1]] = word == "sp" or int(word[-1])
    return MemoryCase(model=model, name=name, parallel=parallel_config(**sizes), **settings)


CASES = (
    _case("dense", "tp1"),
    _case("dense", "tp1", dtype="bfloat16"),
    _case("dense", "tp1", recompute="full"),
    _case("dense", "tp1", recompute="selective"),
    _case("wide vocabulary", "tp1"),
    _case("dense", "tp2"),
    _case("dense", "tp2 sp"),
    _case("dense", "cp2", distributed=True),
    _case("dense", "dp2", dtype="bfloat16", distributed=True),
    _case("tied", "pp2", num_microbatches=4),
    _case("dense", "pp2", num_microbatches=1),
    MemoryCase(
        model="dense",
        name="pp2 (1+3)",
        parallel=ParallelConfig(
            pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=1
        ),
        num_microbatches=4,
    ),
    _case("dense", "pp2 vpp2", num_microbatches=4),
    _case("mixture", "tp1"),
    _case("mixture", "ep2 dp2", distributed=True),
    _case("mixture", "ep2 tp2 sp"),
)
"""What is measured on a CPU."""

GPU_CASES = tuple(
    _case("dense", "tp1", dtype="bfloat16", recompute=recompute, stream_tokens=8192)
    for recompute in ("none", "full")
)
"""What is measured on one GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Bytes on one rank."""

    weights: int
    """Of all parameters."""

    gradients: int
    """Of Megatron's gradient buffers."""

    optimizer: int
    """Of main weights and moments."""

    working: int
    """Peak of all else in the second update."""


def build_model(name: str, *, is_large: bool = False) -> PreTrainedModel:
    """Return a model in which activations, weights or logits are what counts."""
    scale = 4 if is_large else 1
    if name == "mixture":
        config = Qwen3MoeConfig(
            vocab_size=512,
            hidden_size=256 * scale,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32 * scale,
            intermediate_size=512,
            moe_intermediate_size=256 * scale,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            max_position_embeddings=16384,
            tie_word_embeddings=False,
            pad_token_id=None,
            dtype="float32",
        )
        return randomize(Qwen3MoeForCausalLM(config), seed=0)
    is_wide = name == "wide vocabulary"
    return build_tiny_qwen3(
        hidden_size=256 * scale,
        num_layers=1 if is_wide else 4,
        num_heads=8,
        num_key_value_heads=4,
        head_dim=32 * scale,
        ffn_size=768 * scale,
        vocab_size=8192 if is_wide else 512,
        tie_word_embeddings=name == "tied",
    )


def measure_case(folder: Path, case: MemoryCase) -> list[Measured]:
    """Return what every rank of a case used; on a GPU this process is the only rank."""
    if torch.cuda.is_available():
        try:
            return [_measure(0, folder, case)]
        finally:
            topology.shut_down()
    return run_on_ranks(_measure, folder, case, world_size=case.parallel.world_size)


def predict_case(
    folder: Path, case: MemoryCase, *, device: Literal["cuda", "cpu"] = "cpu"
) -> tuple[StageMemory, ...]:
    """Return what every pipeline stage should use."""
    shape = read_model_shape(read_hf_config(folder))
    return estimate_stages(shape, case.policy, case.workload, device=device)


def by_stage(case: MemoryCase, measured: list[Measured]) -> list[Measured]:
    """Return the rank of each pipeline stage that worked with most memory."""
    stages = case.parallel.pipeline_model_parallel_size
    ranks = len(measured) // stages
    return [
        max(measured[stage * ranks : (stage + 1) * ranks], key=lambda rank: rank.working)
        for stage in range(stages)
    ]


def assert_predicted(predicted: StageMemory, measured: Measured) -> None:
    """Fail if a part is outside its tolerance."""
    for part, tolerance in (
        ("weights", RESIDENT_TOLERANCE),
        ("gradients", RESIDENT_TOLERANCE),
        ("optimizer", RESIDENT_TOLERANCE),
        ("working", WORKING_TOLERANCE),
    ):
        error = getattr(predicted, part) / getattr(measured, part) - 1
        assert abs(error) <= tolerance, f"{part}: {error:+.1%} of {getattr(measured, part)} bytes"


def _measure(_rank: int, folder: Path, case: MemoryCase) -> Measured:
    """Update twice and return this rank's bytes."""
    policy, batch = _build(folder, case)
    policy.update(batch)  # makes the optimizer's state
    parameters = [p for chunk in policy.model_chunks for p in chunk.parameters()]
    buffers = [
        buffer.grad_data
        for chunk in policy.model_chunks
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    stepped = list(_optimizer_tensors(policy))
    weights, gradients, state = (_storages(ts) for ts in (parameters, buffers, stepped))
    for key in (*weights, *gradients):
        state.pop(key, None)  # a float32 optimizer steps the weights themselves
    resident = [sum(storages.values()) for storages in (weights, gradients, state)]
    if policy.topology.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        policy.update(batch)
        working = torch.cuda.max_memory_allocated() - sum(resident)
    else:
        with LiveMemory([*parameters, *buffers, *stepped]) as memory:
            policy.update(batch)
        working = memory.peak
    return Measured(
        weights=resident[0], gradients=resident[1], optimizer=resident[2], working=working
    )


def _build(folder: Path, case: MemoryCase) -> tuple[MegatronPolicy, PackedBatch]:
    """Return the policy and a batch of sequences of one length."""
    parallel, tokens = case.parallel, case.stream_tokens
    policy = build_policy(
        folder,
        parallel=parallel,
        stream_tokens=tokens,
        dtype=case.dtype,
        recompute=case.recompute,
        optimizer=OptimizerConfig(lr=1e-5, use_distributed_optimizer=case.distributed),
    )
    length = tokens // SEQUENCES_PER_STREAM
    num_streams = case.num_microbatches * parallel.data_parallel_size
    generator = np.random.default_rng(0)
    sequences = [
        TrainingSequence(
            sequence_id=str(index),
            group_index=index,
            context_token_ids=tuple(generator.integers(4, 32, length // 2).tolist()),
            completion_token_ids=tuple(generator.integers(4, 32, length // 2).tolist()),
            advantage=1.0,
            rollout_logprobs=(0.0,) * (length // 2),
        )
        for index in range(num_streams * SEQUENCES_PER_STREAM)
    ]
    batch = pack(
        sequences,
        stream_tokens=tokens,
        num_ranks=parallel.data_parallel_size,
        streams_multiple=parallel.microbatch_multiple,
        sequence_multiple=parallel.sequence_multiple,
        max_completion_tokens=length,
    )
    assert len(batch.streams) == num_streams, "whole streams of equal sequences"
    return policy, batch


def _optimizer_tensors(policy: MegatronPolicy) -> Iterator[Tensor]:
    """Yield all that the optimizers hold."""
    for optimizer in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        inner = optimizer.optimizer
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of each storage once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def main() -> None:
    """Measure every case, and print or write the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="file whose marked text is replaced")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    is_gpu = torch.cuda.is_available()
    lines = [
        "| model | layout | stage | weights | gradients | optimizer | working | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in GPU_CASES if is_gpu else CASES:
            model_folder = Path(folder) / case.model
            if not model_folder.exists():
                write_model_folder(build_model(case.model, is_large=is_gpu), model_folder)
            predicted = predict_case(model_folder, case, device="cuda" if is_gpu else "cpu")
            measured = by_stage(case, measure_case(model_folder, case))
            for one, other in zip(predicted, measured, strict=True):
                lines.append(_line(case, one, other))
                sys.stderr.write(lines[-1] + "\n")
                figures.append(_figures(case, one, other))
    if arguments.json is not None:
        device = torch.cuda.get_device_name() if is_gpu else platform.processor() or "cpu"
        report = {"device": device, "torch": torch.__version__, "cases": figures}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(lines) + "\n"
    if arguments.write is None:
        sys.stdout.write(text)
        return
    before, _, rest = arguments.write.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    arguments.write.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def _line(case: MemoryCase, predicted: StageMemory, measured: Measured) -> str:
    """Return one row: predicted / measured in MB, and the error of the working memory."""
    name = case.name.upper() + {True: ", distributed optimizer", False: ""}[case.distributed]
    name += ", one microbatch" if case.num_microbatches == 1 else ""
    name += f", {case.recompute} recomputation" if case.recompute != "none" else ""
    cells = [f"{case.model}, {case.dtype}", name, str(predicted.stage)]
    for part in ("weights", "gradients", "optimizer", "working"):
        cells.append(f"{getattr(predicted, part) / 1e6:.1f} / {getattr(measured, part) / 1e6:.1f}")
    cells.append(f"{predicted.working / measured.working - 1:+.1%}")
    return f"| {' | '.join(cells)} |"


def _figures(case: MemoryCase, predicted: StageMemory, measured: Measured) -> dict[str, Any]:
    """Return one case as JSON."""
    return {
        "model": case.model,
        "layout": case.name,
        "dtype": case.dtype,
        "recompute": case.recompute,
        "distributed_optimizer": case.distributed,
        "predicted": asdict(predicted) | {"working": predicted.working},
        "measured": asdict(measured),
    }


if __name__ == "__main__":
    main()
