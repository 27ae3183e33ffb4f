"""Transformer Engine's layers as far as a checkpoint sees them: names and shapes of parameters.

With this folder's parent on the path, Megatron's own wrappers of Transformer Engine are built on
the CPU: which parameters a layer has, how ranks share them and under which names they are stored is
then Megatron's code and not a copy of it. Nothing here computes. Names and shapes were compared
with the source of Transformer Engine 2.20.
"""

from transformer_engine import common, pytorch

__version__ = "2.6.0"  # from 2.7 on, Megatron imports kernels of the router

__all__ = ["common", "pytorch"]
