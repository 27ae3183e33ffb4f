"""That attention keeps the sequences of a packed stream apart, seen in gradients."""

import itertools

import torch
from torch import Tensor

from prefixrl_mcore.data.packing import Stream
from prefixrl_mcore.policy import cpu_runtime
from prefixrl_mcore.policy.build import unwrap
from prefixrl_mcore.policy.forward_backward import run_model
from prefixrl_mcore.policy.microbatch import build_microbatch
from prefixrl_mcore.policy.policy import MegatronPolicy


def assert_sequences_are_apart(policy: MegatronPolicy, stream: Stream) -> None:
    """Fail if a sequence's logprobs depend on the embedding of another sequence's token, at all.

    They must depend on each of its own tokens but the last, which predicts nothing.
    """
    microbatch = build_microbatch(stream, policy.stream_settings)
    model = unwrap(policy.model_chunks[0])
    embeddings: list[Tensor] = []

    def keep(module: object, inputs: object, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    hook = model.embedding.register_forward_hook(keep)
    with cpu_runtime.megatron_on_cpu():
        logprobs_R = run_model(policy.model_chunks[0], microbatch).logprobs_R
    hook.remove()
    num_checked = 0
    for first, last in itertools.pairwise(stream.sequence_starts.tolist()):
        inside = torch.from_numpy((stream.rows_R >= first) & (stream.rows_R < last))
        if not inside.any():
            continue
        summed = logprobs_R[inside.to(logprobs_R.device)].sum()
        (grad_T,) = torch.autograd.grad(summed, embeddings[0], retain_graph=True)
        size_T = grad_T.abs().amax(dim=(1, 2))
        assert size_T[first : last - 1].min() > 0.0
        assert float(torch.cat((size_T[:first], size_T[last:])).sum()) == 0.0
        num_checked += 1
    assert num_checked >= 3
