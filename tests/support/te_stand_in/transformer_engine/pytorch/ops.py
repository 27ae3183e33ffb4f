"""Named in annotations of Megatron."""


class Sequential:
    """A chain of operations."""


class FusibleOperation:
    """One of them."""
