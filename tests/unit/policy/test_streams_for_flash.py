"""What attention kernels that know of sequences get of a packed stream."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from prefixrl_mcore.checkpoint.convert.live_export import export_hf_weights
from prefixrl_mcore.checkpoint.convert.live_load import load_hf_weights
from prefixrl_mcore.data.packing import Stream
from prefixrl_mcore.policy.build import unwrap
from prefixrl_mcore.policy.microbatch import StreamSettings, build_microbatch
from prefixrl_mcore.policy.packed import PackedStream
from prefixrl_mcore.policy.te_attention import thd_stream
from tests.support.policies import build_policy, make_batch, make_sequences, max_difference


def packed(stream: Stream, settings: StreamSettings) -> PackedStream:
    return build_microbatch(stream, settings).packed


def test_boundaries_of_whole_and_shared_streams(tied_folder: Path) -> None:
    settings = build_policy(tied_folder).stream_settings
    sequences = make_sequences(4)
    lengths = [len(s.context_token_ids) + len(s.completion_token_ids) for s in sequences]
    (stream,) = make_batch(sequences).streams
    whole = packed(stream, settings)
    assert whole.cu_seqlens_q.dtype == torch.int32
    assert sorted(whole.cu_seqlens_q.diff().tolist()) == sorted(lengths)
    assert whole.max_seqlen_q == max(lengths)
    # Half the tokens are here, but boundaries are those of the whole stream.
    (stream,) = make_batch(sequences, sequence_multiple=4).streams
    half = packed(stream, replace(settings, multiple=4, padding_length=4, cp_size=2))
    padded = [-(-length // 4) * 4 for length in lengths]
    assert sorted(half.cu_seqlens_q.diff().tolist()) == sorted(padded)
    assert half.position_ids_T is not None
    assert half.position_ids_T.numel() == sum(padded) // 2


def test_kept_padding_is_cut_into_blocks_and_a_rest(tied_folder: Path) -> None:
    settings = build_policy(tied_folder).stream_settings
    (sequence,) = make_sequences(1, seed=1)
    length = len(sequence.context_token_ids) + len(sequence.completion_token_ids)
    (stream,) = make_batch([sequence], stream_tokens=length + 70).streams
    kept = packed(stream, replace(settings, is_static=True, padding_length=32))
    assert kept.cu_seqlens_q.tolist() == [0, length, length + 32, length + 64, length + 70]
    exact = packed(stream, replace(settings, is_static=True, padding_length=35))
    assert exact.cu_seqlens_q.tolist() == [0, length, length + 35, length + 70]
    cut_off = packed(stream, replace(settings, padding_length=32))
    assert cut_off.cu_seqlens_q.tolist() == [0, length]


def test_without_the_padded_layout_only_boundaries_are_left(tied_folder: Path) -> None:
    settings = build_policy(tied_folder).stream_settings
    stream = make_batch().streams[0]
    with_layout = packed(stream, settings)
    without = packed(stream, replace(settings, has_padded_layout=False))
    assert with_layout.buckets
    assert without.buckets == ()
    assert without.slot_tokens_P.numel() == without.token_slots_T.numel() == 0
    assert torch.equal(without.cu_seqlens_q, with_layout.cu_seqlens_q)


def test_transformer_engine_is_told_that_nothing_is_between_sequences(tied_folder: Path) -> None:
    stream = packed(make_batch().streams[0], build_policy(tied_folder).stream_settings)
    thd = thd_stream(stream)
    assert (stream.qkv_format, thd.qkv_format, thd.pad_between_seqs) == ("sbhd", "thd", False)
    for starts in (thd.cu_seqlens_kv, thd.cu_seqlens_q_padded, thd.cu_seqlens_kv_padded):
        assert starts is thd.cu_seqlens_q  # the same object: Transformer Engine asks for that
    assert (thd.max_seqlen_q, thd.max_seqlen_kv) == (stream.max_seqlen_q,) * 2


def test_weights_under_transformer_engines_names_go_in_and_out_bit_for_bit(
    tied_folder: Path,
) -> None:
    """Norms that are fused into the next projection keep their values under its name."""
    policy, other = build_policy(tied_folder), build_policy(tied_folder)
    truth = dict(policy.export_weights())
    for layer in unwrap(policy.model_chunks[0]).decoder.layers:
        for norm, projection in (
            ("input_layernorm", layer.self_attention.linear_qkv),
            ("pre_mlp_layernorm", layer.mlp.linear_fc1),
        ):
            weight = layer.get_submodule(norm).weight
            projection.register_parameter("layer_norm_weight", nn.Parameter(weight.detach()))
            delattr(layer, norm)
    chunks, hf_config = policy.model_chunks, other.hf_config
    names = {name for name, _ in chunks[0].named_parameters()}
    assert sum("layer_norm_weight" in name for name in names) == 2 * policy.shape.num_layers
    assert max_difference(dict(export_hf_weights(chunks, hf_config)), truth) == 0.0
    for parameter in chunks[0].parameters():
        parameter.data.zero_()
    load_hf_weights(chunks, tied_folder, hf_config)
    assert max_difference(dict(export_hf_weights(chunks, hf_config)), truth) == 0.0
