import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefixrl_mcore.checkpoint.convert.hf_folder import (
    HfWeights,
    asset_files,
    digest_of_weights,
    read_assets,
)
from prefixrl_mcore.checkpoint.convert.hf_writer import write_hf_folder
from prefixrl_mcore.checkpoint.manifest import CheckpointError
from prefixrl_mcore.config.model_shape import read_hf_config
from tests.support.tiny_models import write_tiny_qwen3
from tests.support.weights import HeldWeights, weights_in

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_qwen3(tmp_path / "source")


def check(folder: Path) -> None:
    with HfWeights(folder) as weights:
        weights.check(read_hf_config(folder))


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def test_a_complete_folder_passes(source: Path) -> None:
    check(source)


def test_a_truncated_file_is_named(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged or truncated"):
        check(source)


def test_a_missing_weight_is_named(source: Path) -> None:
    rewrite(source, **{Q_PROJ: None})
    with pytest.raises(CheckpointError, match=rf"1 missing: {Q_PROJ}"):
        check(source)


def test_an_extra_weight_is_named(source: Path) -> None:
    rewrite(source, extra=torch.zeros(1))
    with pytest.raises(CheckpointError, match="1 unexpected: extra"):
        check(source)


def test_a_wrong_shape_is_named_with_both_shapes(source: Path) -> None:
    rewrite(source, **{Q_PROJ: torch.zeros(64, 63)})
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ} got \[64, 63\], expected \[64, 64\]"):
        check(source)


def test_a_tied_head_in_the_file_must_equal_the_embedding(source: Path) -> None:
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(source, **{"lm_head.weight": embedding.clone()})
    check(source)
    rewrite(source, **{"lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        check(source)


@pytest.mark.parametrize(
    ("remove", "message"),
    [("model.safetensors", "has neither"), ("config.json", r"config\.json: does not exist")],
)
def test_an_incomplete_folder_is_refused(remove: str, message: str, source: Path) -> None:
    (source / remove).unlink()
    with pytest.raises(ValueError, match=message):
        check(source)


def test_a_folder_in_several_files_equals_the_one_in_a_single_file(
    source: Path, tmp_path: Path
) -> None:
    whole = weights_in(source)
    write_hf_folder(HeldWeights(whole), source, tmp_path / "out", max_file_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in whole.values())
    copy = weights_in(tmp_path / "out")
    assert copy.keys() == whole.keys()
    assert all(torch.equal(copy[name], whole[name]) for name in whole)
    check(tmp_path / "out")


@pytest.mark.parametrize("name", [3, "../elsewhere.safetensors", None])
def test_an_index_names_files_of_its_folder(source: Path, tmp_path: Path, name: object) -> None:
    out = tmp_path / "out"
    write_hf_folder(HeldWeights(weights_in(source)), source, out, max_file_bytes=100_000)
    path = out / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][Q_PROJ] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is no name of a file in the folder"):
        HfWeights(out)


def test_an_index_that_does_not_fit_its_files_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_hf_folder(HeldWeights(weights_in(source)), source, out, max_file_bytes=100_000)
    path = out / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][Q_PROJ]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"does not fit the files.*{Q_PROJ}"):
        check(out)
    (out / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00004\.safetensors: is missing"):
        check(out)


def test_a_weight_file_that_the_index_does_not_name_is_refused(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_hf_folder(HeldWeights(weights_in(source)), source, out, max_file_bytes=100_000)
    shutil.copyfile(source / "model.safetensors", out / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not name: \['model\.safetensors'\]"):
        check(out)


def test_a_second_weight_file_without_an_index_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(source, out)
    shutil.copyfile(source / "model.safetensors", out / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"does not name: \['consolidated\.safetensors'\]"):
        check(out)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64])
def test_weights_that_are_no_real_numbers_are_refused(source: Path, dtype: torch.dtype) -> None:
    rewrite(source, **{Q_PROJ: torch.ones(64, 64, dtype=dtype)})
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ} has type .* F64, F32, BF16, F16"):
        check(source)


def test_everything_but_weights_is_copied_byte_for_byte(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text((source / "config.json").read_text() + "\n\n ")
    (source / "vocab.txt").write_bytes(b"\xff\x00odd bytes")
    write_hf_folder(HeldWeights(weights_in(source)), source, tmp_path / "out")
    names = [path.name for path in asset_files(source)]
    assert names == [
        *("chat_template.jinja", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    ]
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_templates_in_their_folder_are_copied(source: Path, tmp_path: Path) -> None:
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    write_hf_folder(HeldWeights(weights_in(source)), source, tmp_path / "out")
    copy = tmp_path / "out" / "additional_chat_templates" / "tools.jinja"
    assert copy.read_text() == "{{ tools }}"


def test_a_link_to_nothing_is_named(source: Path) -> None:
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("../blobs/1234")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a link to \.\./blobs/1234"):
        asset_files(source)


def test_a_link_to_nothing_where_nothing_is_copied_is_no_fault(source: Path) -> None:
    names = sorted(read_assets(source))
    for name in ("pytorch_model.bin", ".gitattributes"):
        (source / name).symlink_to("../blobs/pruned")
    assert sorted(read_assets(source)) == names


def test_a_file_that_is_too_large_for_a_tokenizer_is_named(source: Path) -> None:
    with (source / "original.tar").open("wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(CheckpointError, match=r"original\.tar: has 1073741825 bytes, expected a"):
        read_assets(source)


def test_the_digest_sees_one_tensor_between_larger_ones(tmp_path: Path) -> None:
    """As merging an adapter of the query projections changes it."""
    large, query = torch.zeros(2**19), torch.zeros(64, 64)

    def digest(**changes: Tensor) -> str:
        weights = {"a": large, "query": query, "z": large.clone()}
        save_file(weights | changes, tmp_path / "model.safetensors")
        return digest_of_weights(tmp_path)

    assert digest() == digest()
    assert len({digest(), digest(query=query + 1), digest(a=large + 1), digest(z=large + 1)}) == 4
    end = large.clone()
    end[-1] = 1
    assert digest(a=end) != digest()


def test_a_chosen_dtype_is_written(source: Path, tmp_path: Path) -> None:
    whole = weights_in(source)
    write_hf_folder(HeldWeights(whole), source, tmp_path / "out", dtype=torch.bfloat16)
    copy = weights_in(tmp_path / "out")
    assert torch.equal(copy[Q_PROJ], whole[Q_PROJ].to(torch.bfloat16))


def test_a_dtype_other_than_the_configs_is_logged(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = weights_in(source)
    write_hf_folder(HeldWeights(whole), source, tmp_path / "same")
    assert caplog.text == ""
    write_hf_folder(HeldWeights(whole), source, tmp_path / "other", dtype=torch.bfloat16)
    assert "weights are bfloat16 but config.json, copied unchanged, says float32" in caplog.text


@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_a_wrong_set_of_weights_leaves_no_folder(fault: str, source: Path, tmp_path: Path) -> None:
    items = list(weights_in(source).items())
    if fault == "missing":
        items, expected = items[:-1], "1 missing"
    elif fault == "extra":
        items, expected = [*items, ("extra", torch.zeros(1))], "1 unexpected: extra"
    else:
        items, expected = [(items[0][0], torch.zeros(2, 2)), *items[1:]], "got \\[2, 2\\]"
    with pytest.raises(CheckpointError, match=expected):
        write_hf_folder(HeldWeights(dict(items)), source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_that_holds_something_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_hf_folder(HeldWeights(weights_in(source)), source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="out: exists"):
        write_hf_folder(HeldWeights(weights_in(source)), source, tmp_path / "out")
