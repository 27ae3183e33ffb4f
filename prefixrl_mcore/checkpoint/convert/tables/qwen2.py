"""Qwen2 and Qwen2.5, dense: biases on the query, key and value projections."""

from prefixrl_mcore.checkpoint.convert.decoder import decoder_table

TABLE = decoder_table("qwen2", has_qkv_bias=True)
