"""Llama 3: the plain decoder."""

from prefixrl_mcore.checkpoint.convert.decoder import decoder_table

TABLE = decoder_table("llama")
