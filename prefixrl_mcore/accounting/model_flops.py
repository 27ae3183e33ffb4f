"""FLOPs of the matrix products that a model computes: for MFU, and to balance work over ranks.

Unlike the charge of ``accounting.flops`` (the paper's 6ND, the same for every engine), this
counts what a pass over packed streams has to multiply. A multiply-add is 2 FLOPs; norms, rotary
embedding, softmax and the look-up of the embedding are left out.
"""

from dataclasses import dataclass

from prefixrl_mcore.config.model_shape import ModelShape

_BACKWARD_AND_FORWARD = 3.0
"""A backward pass multiplies twice as much as the forward pass: for inputs and for weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """How much a pass runs through the model; adds up over sequences, streams and ranks."""

    num_tokens: int
    """Tokens that the layers compute, kept padding included."""

    num_rows: int
    """Positions whose logits are computed: those that predict a completion token."""

    num_pairs: int
    """Pairs of a token and a token that it sees, itself included: ``L (L + 1) / 2`` of a sequence
    of ``L`` tokens."""

    def __add__(self, other: "Work") -> "Work":
        """Return both together."""
        return Work(
            num_tokens=self.num_tokens + other.num_tokens,
            num_rows=self.num_rows + other.num_rows,
            num_pairs=self.num_pairs + other.num_pairs,
        )


NO_WORK = Work(num_tokens=0, num_rows=0, num_pairs=0)


def sequence_work(num_tokens: int, num_rows: int) -> Work:
    """Return the work of one causal sequence."""
    return Work(
        num_tokens=num_tokens, num_rows=num_rows, num_pairs=num_tokens * (num_tokens + 1) // 2
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlops:
    """FLOPs of one forward pass by what they grow with."""

    per_token: float
    """2 x the matrix weights of all layers that a token meets; of a mixture of experts those of
    the router and of the experts that a token is routed to."""

    per_row: float
    """2 x hidden size x vocabulary: the output layer, which only rows meet."""

    per_pair: float
    """4 x layers x heads x head width: a query times a key, and a probability times a value."""

    @classmethod
    def of(cls, shape: ModelShape) -> "ModelFlops":
        """Return the FLOPs of a model."""
        hidden, width = shape.hidden_size, shape.kv_channels
        attention = 2 * hidden * width * (shape.num_attention_heads + shape.num_query_groups)
        feed_forward = 3 * hidden * shape.ffn_hidden_size
        if shape.mixture is not None:
            feed_forward *= shape.mixture.num_experts_per_token
            feed_forward += hidden * shape.mixture.num_experts
        return cls(
            per_token=2.0 * shape.num_layers * (attention + feed_forward),
            per_row=2.0 * hidden * shape.vocab_size,
            per_pair=4.0 * shape.num_layers * shape.num_attention_heads * width,
        )

    def forward(self, work: Work) -> float:
        """Return the FLOPs of a forward pass."""
        return (
            self.per_token * work.num_tokens
            + self.per_row * work.num_rows
            + self.per_pair * work.num_pairs
        )

    def forward_backward(self, work: Work) -> float:
        """Return the FLOPs of a forward and a backward pass: the numerator of MFU.

        ``6 N`` per token and, for attention, ``12 x layers x heads x head width`` per visible
        pair, after PaLM (arXiv:2204.02311, appendix B), with two differences that make it
        smaller: attention is causal, so that only visible pairs count (PaLM counts all), and the
        output layer's weights count for rows only, because prompt and prefix never enter it.
        What activation recomputation or the head compute once more does not count: these are the
        FLOPs of the model (MFU), not of the hardware (HFU).
        """
        return _BACKWARD_AND_FORWARD * self.forward(work)
