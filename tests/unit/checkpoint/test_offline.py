import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefixrl_mcore.checkpoint.convert.hf_writer import write_hf_folder
from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf, convert_to_hf
from prefixrl_mcore.checkpoint.manifest import CheckpointError, read_manifest, seal_folder, verify
from prefixrl_mcore.checkpoint.save_load import load_checkpoint, save_checkpoint
from prefixrl_mcore.checkpoint.torch_dist import TorchDistReader, is_extra_state
from prefixrl_mcore.checkpoint.torch_dist_writer import Piece, TorchDistWriter, data_file_name
from tests.support.policies import build_policy, make_batch, max_difference, weights_of
from tests.support.tiny_models import write_tiny_qwen3
from tests.support.weights import HeldWeights, weights_in


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def trained(
    source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint after one update, and its weights as the live model exports them."""
    policy = build_policy(source)
    policy.update(make_batch())
    path = save_checkpoint(tmp_path_factory.mktemp("run"), 1, policy, {})
    return path, weights_of(policy)


def test_the_folder_equals_the_live_export_bit_for_bit(
    source: Path, trained: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    checkpoint, live = trained
    assert convert_to_hf(checkpoint, tmp_path / "out") == checkpoint
    assert max_difference(weights_in(tmp_path / "out"), live) == 0.0
    assert max_difference(live, weights_in(source)) > 1e-4  # the update did something
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_a_folder_of_checkpoints_and_a_run_stand_for_their_latest(
    trained: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    checkpoint, _ = trained
    assert convert_to_hf(checkpoint.parent, tmp_path / "out") == checkpoint
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(checkpoint.parent)
    found = convert_to_hf(tmp_path / "run", tmp_path / "of run")
    assert found == tmp_path / "run" / "checkpoints" / checkpoint.name


def test_transformers_loads_the_folder_and_computes_the_same(
    trained: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    checkpoint, live = trained
    convert_to_hf(checkpoint, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = AutoModelForCausalLM.from_config(model.config)
    # strict=False: a tied model's state dict also names its output head.
    assert expected.load_state_dict(live, strict=False).unexpected_keys == []
    token_ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        ours = model.eval()(token_ids).logits.log_softmax(-1)
        theirs = expected.eval()(token_ids).logits.log_softmax(-1)
    assert torch.equal(ours, theirs)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("1 + 2").input_ids != []


def test_there_and_back_again_gives_the_same_bits(source: Path, tmp_path: Path) -> None:
    convert_from_hf(source, tmp_path / "checkpoint")
    verify(tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert max_difference(weights_in(tmp_path / "out"), weights_in(source)) == 0.0


def test_a_folder_of_several_files_converts_alike(source: Path, tmp_path: Path) -> None:
    split = tmp_path / "split"
    write_hf_folder(HeldWeights(weights_in(source)), source, split, max_file_bytes=60_000)
    assert len(list(split.glob("*.safetensors"))) > 3
    convert_from_hf(split, tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert max_difference(weights_in(tmp_path / "out"), weights_in(source)) == 0.0


def test_a_converted_checkpoint_loads_into_a_policy(source: Path, tmp_path: Path) -> None:
    convert_from_hf(source, tmp_path / "checkpoint")
    is_tied = json.loads((source / "config.json").read_text())["tie_word_embeddings"]
    other = write_tiny_qwen3(tmp_path / "other", seed=5, tie_word_embeddings=is_tied)
    policy = build_policy(other)
    load_checkpoint(tmp_path / "checkpoint", policy)
    assert max_difference(weights_of(policy), weights_in(source)) == 0.0


def test_a_chosen_dtype_is_written_both_ways(source: Path, tmp_path: Path) -> None:
    convert_from_hf(source, tmp_path / "checkpoint", torch.bfloat16)
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "out")
    rounded = {name: tensor.bfloat16() for name, tensor in weights_in(source).items()}
    assert max_difference(weights_in(tmp_path / "out"), rounded) == 0.0
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "wide", torch.float32)
    assert {t.dtype for t in weights_in(tmp_path / "wide").values()} == {torch.float32}


def test_no_model_and_no_process_group_are_needed(tmp_path: Path) -> None:
    convert_from_hf(write_tiny_qwen3(tmp_path / "source"), tmp_path / "checkpoint")
    script = (
        "import sys; from pathlib import Path; import torch.distributed as dist\n"
        "from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf, convert_to_hf\n"
        "checkpoint, out = map(Path, sys.argv[1:])\n"
        "convert_to_hf(checkpoint, out)\n"
        "convert_from_hf(out, out.with_name('back'))\n"
        "assert not dist.is_initialized()\n"
        "assert not {'megatron', 'transformers'} & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "checkpoint"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_damaged_checkpoint_makes_no_folder(source: Path, tmp_path: Path) -> None:
    convert_from_hf(source, tmp_path / "checkpoint")
    data = tmp_path / "checkpoint" / "megatron" / "__0_1.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_1\.distcp: content is damaged"):
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failing_conversion_makes_no_checkpoint(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: does not exist"):
        convert_from_hf(tmp_path / "nowhere", tmp_path / "checkpoint")
    broken = tmp_path / "broken"
    write_hf_folder(HeldWeights(weights_in(source)), source, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"11 missing: model\.layers\.2\."):
        convert_from_hf(broken, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_what_exists_is_not_overwritten(
    source: Path, trained: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="file: exists"):
        convert_to_hf(trained[0], tmp_path / "file")
    created = read_manifest(trained[0]).created_unix_seconds
    with pytest.raises(CheckpointError, match="exists, expected a new or empty folder"):
        convert_from_hf(source, trained[0])
    assert read_manifest(trained[0]).created_unix_seconds == created


def piece(name: str, full_shape: tuple[int, ...], offsets: tuple[int, ...], *rows: int) -> Piece:
    """A [len(rows), 1] part of a tensor."""
    tensor = torch.tensor(rows)[:, None]
    return Piece(name=name, full_shape=full_shape, offsets=offsets, tensor=tensor)


def write_pieces(folder: Path, pieces: list[Piece]) -> None:
    writer = TorchDistWriter(folder)
    writer.write_file(data_file_name(0), pieces)
    writer.finish()


def test_pieces_are_put_together_in_their_places(tmp_path: Path) -> None:
    pieces = [piece("w", (3, 1), (2, 0), 7), piece("w", (3, 1), (0, 0), 5, 6)]
    write_pieces(tmp_path, pieces)
    reader = TorchDistReader(tmp_path)
    assert reader.shapes == {"w": (3, 1)}
    assert reader.read("w").tolist() == [[5], [6], [7]]
    assert [reader.read("w", index).tolist() for index in range(3)] == [[5], [6], [7]]


def test_a_hole_in_a_tensor_is_refused(tmp_path: Path) -> None:
    write_pieces(tmp_path, [piece("w", (3, 1), (0, 0), 5, 6)])
    with pytest.raises(CheckpointError, match=r": w has pieces of 2 .* expected 3"):
        TorchDistReader(tmp_path).read("w")


def test_pieces_that_overlap_do_not_hide_a_hole(tmp_path: Path) -> None:
    write_pieces(tmp_path, [piece("w", (4, 1), (0, 0), 5, 6), piece("w", (4, 1), (1, 0), 6, 7)])
    with pytest.raises(
        CheckpointError, match=r"w has pieces that overlap, at \(0, 0\) and \(1, 0\)"
    ):
        TorchDistReader(tmp_path).read("w")


def test_weights_that_the_config_says_nothing_of_are_refused(tmp_path: Path) -> None:
    source = write_tiny_qwen3(tmp_path / "source", tie_word_embeddings=False)
    convert_from_hf(source, tmp_path / "checkpoint")
    config_file = tmp_path / "checkpoint" / "hf" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "tie_word_embeddings": True}))
    (tmp_path / "checkpoint" / "manifest.json").unlink()
    seal_folder(tmp_path / "checkpoint", tmp_path / "sealed")
    with pytest.raises(CheckpointError, match=r"holds 1 weights .*: output_layer\.weight"):
        convert_to_hf(tmp_path / "sealed", tmp_path / "out")


def test_transformer_engines_private_state_is_told_from_weights() -> None:
    for name in ("self_attention.linear_qkv._extra_state", "mlp.experts.linear_fc1._extra_state12"):
        assert is_extra_state(f"decoder.layers.{name}")
    assert not is_extra_state("decoder.layers.mlp.experts.linear_fc1.weight1")


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_metadata_that_would_run_code_is_refused_without_running_it(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "touched")))
    with pytest.raises(CheckpointError, match=r"not to be trusted \(names "):
        TorchDistReader(tmp_path)
    assert not (tmp_path / "touched").exists()


def test_a_checkpoint_that_is_replaced_while_it_is_converted_is_refused(tmp_path: Path) -> None:
    """As a save of the same step does: the index fits the files of both, and so do checksums."""
    checkpoint, other = tmp_path / "step-000001", tmp_path / "other"
    convert_from_hf(write_tiny_qwen3(tmp_path / "a"), checkpoint, max_file_bytes=60_000)
    convert_from_hf(write_tiny_qwen3(tmp_path / "b", seed=9), other, max_file_bytes=60_000)
    done: list[int] = []

    def replace(num_bytes: int) -> None:
        done.append(num_bytes)
        if sum(done) > 100_000 and other.exists():
            checkpoint.rename(tmp_path / "gone")
            other.rename(checkpoint)

    with pytest.raises(CheckpointError, match="step-000001: was replaced or deleted while"):
        convert_to_hf(checkpoint, tmp_path / "out", on_start=lambda _total: replace)
    assert sum(done) > 200_000, "all weights were written"
    assert not (tmp_path / "out").exists()
