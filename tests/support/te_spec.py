"""Checkpoints of Transformer Engine's layer spec on the CPU; a process of its own.

``python -m tests.support.te_spec FOLDER`` with ``te_stand_in`` on the path: see ``run_cases``.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from torch import Tensor

from prefixrl_mcore.checkpoint.convert.hf_folder import read_assets
from prefixrl_mcore.checkpoint.convert.live_export import export_hf_weights
from prefixrl_mcore.checkpoint.convert.live_load import load_hf_weights
from prefixrl_mcore.checkpoint.save_load import load_checkpoint, save_checkpoint
from prefixrl_mcore.config.policy import OptimizerConfig, ParallelConfig, PolicyConfig
from prefixrl_mcore.policy import topology
from prefixrl_mcore.policy.build import build_model_chunks, build_optimizer, build_scheduler
from prefixrl_mcore.policy.layers import Layers
from prefixrl_mcore.policy.model_config import read_hf_config, read_model_shape
from tests.support.layouts import parse_layout
from tests.support.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).parent / "te_stand_in"

TE_LAYERS = Layers(
    spec="transformer_engine",
    attention="transformer_engine",
    fuses_weight_gradients=False,
    reasons=(),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model in a layout."""

    family: str
    """A key of ``build_tiny_families``."""

    layout: str
    """As ``parse_layout`` takes it."""

    experts: str | None = None
    """``policy.experts.implementation``."""

    @property
    def label(self) -> str:
        """Return the name of its folder."""
        return "-".join(filter(None, (self.family, self.layout.replace(" ", "-"), self.experts)))


CASES = (
    Case(family="qwen3", layout="tp2 sp"),
    Case(family="qwen2.5-tied", layout="pp2"),
    Case(family="llama-3", layout="pp2 vpp2"),
    Case(family="qwen3-moe", layout="ep2 dp2", experts="grouped"),
    Case(family="qwen3-moe", layout="etp2 tp2 sp", experts="grouped"),
    Case(family="qwen3-moe", layout="ep2 dp2", experts="sequential"),
)


@dataclass(kw_only=True)
class SpecPolicy:
    """What saving, loading and converting need of a policy."""

    model_chunks: list[Any]
    optimizer: Any
    scheduler: Any
    hf_config: dict[str, Any]
    model_path: Path | None
    model_files: Mapping[str, bytes]
    seed: int = 0
    policy_version: int = 0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a rank saw."""

    names: list[str]
    """Of its parameters."""

    from_folder: dict[str, Tensor]
    """Streamed after the folder was loaded; empty but on rank 0."""

    from_checkpoint: dict[str, Tensor]
    """Streamed after the converted checkpoint was loaded over other weights; likewise."""


def start(folder: Path) -> None:
    """Run ``run_cases`` on a folder in a process that imports the stand-in."""
    path = os.pathsep.join(map(str, (STAND_IN, ROOT, ROOT / "kernels")))
    subprocess.run(
        [sys.executable, "-m", "tests.support.te_spec", str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        check=True,
    )


def run_cases(folder: Path) -> None:
    """Load and save every case.

    Args:
        folder: for each case a folder of its label with ``source``, ``other`` and ``checkpoint``;
            ``seen.pt``, what each rank saw, and ``run``, a saved checkpoint, are put beside them.
    """
    for case in CASES:
        parallel = parse_layout(case.layout)
        seen = run_on_ranks(
            load_and_save,
            folder / case.label,
            parallel,
            case.experts,
            world_size=parallel.world_size,
        )
        torch.save([vars(one) for one in seen], folder / case.label / "seen.pt")


def load_and_save(rank: int, folder: Path, parallel: ParallelConfig, experts: str | None) -> Seen:
    """Load a folder and a checkpoint, and save what the latter gave."""
    assert HAVE_TE, "the stand-in is not on the path"
    policy = build(folder / "source", parallel, experts)
    stream_of = export_hf_weights
    load_hf_weights(policy.model_chunks, folder / "source", policy.hf_config)
    from_folder = {name: t.clone() for name, t in stream_of(policy.model_chunks, policy.hf_config)}
    load_hf_weights(policy.model_chunks, folder / "other", policy.hf_config)
    policy.optimizer.reload_model_params()
    load_checkpoint(folder / "checkpoint", policy)
    save_checkpoint(folder / "run", 1, policy, {})
    return Seen(
        names=[name for chunk in policy.model_chunks for name, _ in chunk.named_parameters()],
        from_folder=from_folder,
        from_checkpoint={
            name: t.clone() for name, t in stream_of(policy.model_chunks, policy.hf_config)
        },
    )


def build(folder: Path, parallel: ParallelConfig, experts: str | None) -> SpecPolicy:
    """Return a model of Transformer Engine's spec with its optimizer."""
    hf_config = read_hf_config(folder)
    config = PolicyConfig.model_validate(
        {
            "dtype": "bfloat16",
            "parallel": parallel,
            "optimizer": OptimizerConfig(lr=1e-3),
            "experts": {"implementation": experts},
        }
    )
    place = topology.initialize(parallel, seed=0)
    chunks = build_model_chunks(read_model_shape(hf_config), config, TE_LAYERS, place)
    optimizer = build_optimizer(chunks, config, lr=1e-3)
    scheduler = build_scheduler(optimizer, config.optimizer, lr=1e-3, num_steps=2)
    return SpecPolicy(
        model_chunks=chunks,
        optimizer=optimizer,
        scheduler=scheduler,
        hf_config=hf_config,
        model_path=folder,
        model_files=read_assets(folder),
    )


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]))
