"""Transformer Engine's layer spec through the same tables, with stand-ins of its modules.

Names, sharding and stored names are those of Megatron's wrappers, which run here; the modules that
they wrap are ``tests/support/te_stand_in``. With the real ones: ``tests/gpu/te``.
"""

from pathlib import Path

import pytest
import torch

from prefixrl_mcore.checkpoint.convert.checkpoint_weights import CheckpointWeights
from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf, convert_to_hf
from prefixrl_mcore.checkpoint.run_checkpoints import MEGATRON_FOLDER
from prefixrl_mcore.checkpoint.save_load import latest_checkpoint
from prefixrl_mcore.checkpoint.torch_dist import TorchDistReader
from tests.support import te_spec
from tests.support.te_spec import CASES, Case
from tests.support.tiny_models import build_tiny_families, randomize, write_model_folder
from tests.support.weights import assert_same_bits, weights_in

ATTENTION = "self_attention.linear_qkv"
LAYER_NAMES = {
    None: {f"{ATTENTION}.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"},
    "grouped": {"pre_mlp_layernorm.weight", "mlp.experts.linear_fc1.weight0"},
    "sequential": {"pre_mlp_layernorm.weight", "mlp.experts.local_experts.0.linear_fc1.weight"},
}
"""Names that only Transformer Engine's spec has, by the experts' implementation."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all cases after Transformer Engine's layers have loaded and saved."""
    folder = tmp_path_factory.mktemp("te")
    for case in CASES:
        here = folder / case.label
        for name, seed in (("source", 0), ("other", 9)):
            model = randomize(build_tiny_families()[case.family], seed).bfloat16()
            write_model_folder(model, here / name)
        convert_from_hf(here / "source", here / "checkpoint")
    te_spec.start(folder)
    return folder


def stored_weights(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    shapes = TorchDistReader(checkpoint / MEGATRON_FOLDER).shapes
    return {name: tuple(s) for name, s in shapes.items() if not name.startswith("optimizer.")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_transformer_engines_layers_keep_every_bit_in_and_out(folder: Path, case: Case) -> None:
    here = folder / case.label
    truth = weights_in(here / "source")
    ranks = torch.load(here / "seen.pt")
    names = {name.split(".", maxsplit=5)[-1] for seen in ranks for name in seen["names"]}
    assert names >= LAYER_NAMES[case.experts], sorted(names)
    for rank, seen in enumerate(ranks):
        streamed = truth if rank == 0 else {}  # rank 0 serves the engines
        assert_same_bits(seen["from_folder"], streamed)
        assert_same_bits(seen["from_checkpoint"], streamed)

    run = latest_checkpoint(here / "run")
    assert run is not None
    convert_to_hf(run, here / "out")
    assert_same_bits(weights_in(here / "out"), truth)
    # As the local layers store them, so that either spec loads what the other has saved.
    ours, theirs = (stored_weights(path) for path in (run, here / "checkpoint"))
    assert ours.keys() == theirs.keys()
    assert CheckpointWeights(run).infos == CheckpointWeights(here / "checkpoint").infos
