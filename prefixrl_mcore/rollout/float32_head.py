"""An output layer of a bfloat16 model that gives float32 logits.

Shapes: R rows, H hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Float32Head(nn.Linear):
    """A linear layer whose result is float32, as its matrix product accumulates it.

    Products of bfloat16 numbers are exact in float32, so that this is what the trainer's head
    computes. Nothing converted outlives a call: weights that are loaded later are used at once.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., V] float32 logits of [..., H] hidden states in the weight's dtype."""
        hidden_RH = input.flatten(0, -2)
        weight_HV = self.weight.T
        if input.is_cuda:
            logits_RV = torch.mm(hidden_RH, weight_HV, out_dtype=torch.float32)
        else:  # PyTorch has no such product on the CPU
            logits_RV = hidden_RH.float() @ weight_HV.float()
        if self.bias is not None:
            logits_RV += self.bias
        return logits_RV.unflatten(0, input.shape[:-1])


def use_float32_head(model: PreTrainedModel) -> None:
    """Replace the output layer of ``model`` by one with float32 logits and the same parameters.

    Raises:
        ValueError: if the output layer is not a plain linear one.
    """
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"the transformers engine computes float32 logits of a bfloat16 model with a plain "
            f"linear output layer, got {type(linear).__name__}; set rollout.transformers.dtype = "
            '"float32"'
        )
    head = Float32Head(
        linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
    )
    head.weight, head.bias = linear.weight, linear.bias
    model.set_output_embeddings(head)
