"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer.

Folders are written with each expert's matrices under names of their own, which transformers 4 and
5 and SGLang read; folders with fused experts are read too (``fused_experts.py``).
"""

from prefixrl_mcore.checkpoint.convert.decoder import decoder_table

TABLE = decoder_table("qwen3_moe", has_qk_norm=True, is_mixture=True)
