"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer.

Files hold each expert's matrices under names of their own, also those that transformers 5 writes,
which fuses them only in memory.
"""

from prefixrl_mcore.checkpoint.convert.decoder import decoder_table

TABLE = decoder_table("qwen3_moe", has_qk_norm=True, is_mixture=True)
