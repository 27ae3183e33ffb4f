"""Qwen3, dense: grouped-query attention with normed queries and keys, gated feed-forward."""

from prefixrl_mcore.checkpoint.convert.decoder import decoder_table

TABLE = decoder_table("qwen3", has_qk_norm=True)
