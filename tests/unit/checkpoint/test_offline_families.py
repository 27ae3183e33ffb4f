"""Every family there and back, in both types, without a model; exact names, shapes and bits."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf, convert_to_hf
from tests.support.tiny_models import build_tiny_families, write_model_folder
from tests.support.weights import assert_same_bits, weights_in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", list(build_tiny_families()))
def test_there_and_back_again_gives_the_same_bits_and_logits(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    model = build_tiny_families()[family].to(dtype)
    source = write_model_folder(model, tmp_path / "source")
    convert_from_hf(source, tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "out", max_file_bytes=100_000)
    truth = weights_in(source)
    assert {tensor.dtype for tensor in truth.values()} == {dtype}
    assert_same_bits(weights_in(tmp_path / "out"), truth)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    before, after = map(AutoModelForCausalLM.from_pretrained, (source, tmp_path / "out"))
    token_ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        assert torch.equal(after(token_ids).logits, before(token_ids).logits)
