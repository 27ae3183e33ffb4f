"""Every family there and back, in both types, without a model; exact names, shapes and bits."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefixrl_mcore.checkpoint.offline import convert_from_hf, convert_to_hf
from tests.support.tiny_models import build_tiny_families, write_model_folder
from tests.support.weights import weights_in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", list(build_tiny_families()))
def test_there_and_back_again_gives_the_same_bits_and_logits(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    model = build_tiny_families()[family].to(dtype)
    source = write_model_folder(model, tmp_path / "source")
    convert_from_hf(source, tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "out", max_file_bytes=100_000)
    truth, back = weights_in(source), weights_in(tmp_path / "out")
    assert back.keys() == truth.keys()
    for name, tensor in truth.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    before, after = map(AutoModelForCausalLM.from_pretrained, (source, tmp_path / "out"))
    token_ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        assert torch.equal(after(token_ids).logits, before(token_ids).logits)
