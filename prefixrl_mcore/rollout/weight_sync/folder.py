"""The weights of a Hugging Face folder as a stream, for servers that somebody else started."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from prefixrl_mcore.checkpoint.convert.hf_folder import HfWeights
from prefixrl_mcore.rollout.weight_sync.fused import fused_name


def weights_of_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight) of a Hugging Face folder, one in memory at a time.

    What an engine fuses follows each other, which the order of names in a file does not give.
    Where there is a GPU they are on it, as a policy's are: servers on GPUs may get them over NCCL.

    Raises:
        ValueError: if the folder has no weights that can be read.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with HfWeights(folder) as weights:
        for name in sorted(weights.infos, key=fused_name):
            yield name, weights.read(name).to(device)
