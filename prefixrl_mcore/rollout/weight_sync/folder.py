"""The weights of a Hugging Face folder as a stream, for servers that somebody else started."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from prefixrl_mcore.rollout.weight_sync.fused import fused_name


def weights_of_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight) out of the safetensors files of ``folder``, one in memory at a time.

    What an engine fuses follows each other, which the order of names in a file does not give.
    Where there is a GPU they are on it, as a policy's are: servers on GPUs may get them over NCCL.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(path, framework="pt"))
            for path in sorted(folder.glob("*.safetensors"))
        ]
        found = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        for name in sorted(found, key=fused_name):
            yield name, found[name].get_tensor(name).to(device)
