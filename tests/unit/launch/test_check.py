"""``prefixrl check``: arithmetic against hand-worked sizes, and refusals."""

import io
import json
import math
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro
from rich.console import Console

from prefixrl_mcore.accounting.step_time import Assumptions
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.policy import LossConfig, PolicyConfig
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.launch.check import check_layout, gpu_flops, print_check, read_shape
from prefixrl_mcore.launch.machine import Machine

QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
}


MACHINE = Machine(
    num_gpus=None,
    memory_gib=80.0,
    reserved_fraction=0.1,
    assumptions=Assumptions(peak_flops=989.4e12),
    mean_tokens=None,
)


def _config(
    folder: Path,
    parallel: dict[str, Any] | None = None,
    *,
    model: dict[str, Any] | None = None,
    policy: dict[str, Any] | None = None,
    stream_tokens: int = 4096,
    method: str = "prefixrl",
) -> RunConfig:
    """Return a run of Qwen3-4B with changes to its ``config.json`` (``model``)."""
    (folder / "config.json").write_text(json.dumps(QWEN3_4B | (model or {})))
    return RunConfig.model_validate(
        {
            "run_folder": folder / "run",
            "method": method,
            "model": {"path": folder},
            "data": {"problems": folder / "p.jsonl"},
            "rollout": {
                "colocated": True,
                "max_total_tokens": stream_tokens,
                "max_completion_tokens": 1,
            },
            "policy": {"parallel": parallel or {}} | (policy or {}),
        }
    )


def _printed(config: RunConfig, *, suggest: bool = False, **machine: Any) -> str:
    """Return what the command prints."""
    out = io.StringIO()
    console = Console(file=out, width=1000)
    print_check(config, replace(MACHINE, **machine), console, suggest=suggest)
    return out.getvalue()


def _refusal(folder: Path, parallel: dict[str, Any] | None = None, **changes: Any) -> str:
    config = _config(folder, parallel, **changes)
    with pytest.raises(ConfigError) as refusal:
        print_check(config, MACHINE, Console(file=io.StringIO()))
    return str(refusal.value)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 36},
            "36 of 36 layers leave 0 for 1 of 2 pipeline stages",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 5,
                "virtual_pipeline_model_parallel_size": 2,
            },
            "[5] layers of the first and last stage do not divide into 2 chunks each",
        ),
        (
            {"expert_model_parallel_size": 2, "data_parallel_size": 2},
            "needs a mixture-of-experts model, got Qwen3ForCausalLM",
        ),
        ({"expert_model_parallel_size": 2}, "does not divide the 1 ranks of a pipeline stage"),
        ({"virtual_pipeline_model_parallel_size": 2}, "needs pipeline_model_parallel_size > 1"),
        ({"tensor_model_parallel_size": 3}, "32 attention heads do not divide into 3"),
        ({"tensor_model_parallel_size": 16}, "8 key-value heads do not divide into 16"),
        ({"pipeline_model_parallel_size": 5}, "36 layers do not divide into 5"),
    ],
    ids=[
        "uneven",
        "uneven-chunks",
        "expert",
        "stage",
        "virtual",
        "heads",
        "key-value-heads",
        "layers",
    ],
)
def test_a_layout_that_training_refuses_is_refused(
    tmp_path: Path, parallel: dict[str, Any], message: str
) -> None:
    assert message in _refusal(tmp_path, parallel)


MIXTURE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"expert_model_parallel_size": 3, "data_parallel_size": 3}, "64 experts do not divide"),
        ({"tensor_model_parallel_size": 2}, "sequence_parallel must be true for a mixture"),
        (
            {"expert_tensor_parallel_size": 5, "data_parallel_size": 5},
            "expert_tensor_parallel_size: 768 feed-forward width do not divide into 5",
        ),
    ],
    ids=["experts", "sequence-parallel", "width"],
)
def test_a_layout_that_experts_cannot_have_is_refused(
    tmp_path: Path, parallel: dict[str, Any], message: str
) -> None:
    assert message in _refusal(tmp_path, parallel, model=MIXTURE)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            MIXTURE | {"moe_intermediate_size": 772},
            "multiples of 8 in bfloat16, got hidden_size 2560 and moe_intermediate_size 772 / "
            "expert_tensor_parallel_size 1 = 772; use 'sequential'",
        ),
        ({}, "policy.experts needs a mixture-of-experts model, got Qwen3ForCausalLM"),
    ],
    ids=["rows", "dense"],
)
def test_grouped_experts_that_cannot_be_are_refused(
    tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    grouped = {"experts": {"implementation": "grouped"}}
    assert message in _refusal(tmp_path, model=model, policy=grouped)


def test_a_feed_forward_width_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    message = _refusal(
        tmp_path, {"tensor_model_parallel_size": 8}, model={"intermediate_size": 9732}
    )
    assert "9732 feed-forward width do not divide into 8" in message


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
            "['GemmaForCausalLM'] is not supported; expected one of ['LlamaForCausalLM',",
        ),
        ({"model_type": "llama"}, "model_type = 'llama' is not implemented"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
    ids=["architecture", "model-type", "rope", "missing"],
)
def test_a_model_that_training_refuses_is_refused(
    tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    assert message in _refusal(tmp_path, model=model)


def test_a_stream_that_sequence_parallelism_cannot_split_is_refused_with_stages(
    tmp_path: Path,
) -> None:
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    message = _refusal(tmp_path, parallel | {"pipeline_model_parallel_size": 2}, stream_tokens=4097)
    assert "stream of 4097 tokens does not divide into 2 equal parts (tensor 2" in message
    assert "set batch.stream_tokens to 4098 or 4096" in message
    one_stage = _config(tmp_path, parallel, stream_tokens=4097)
    check_layout(one_stage, read_shape(one_stage))


@pytest.mark.parametrize(
    ("parallel", "tokens", "message"),
    [
        pytest.param(
            *({"context_parallel_size": 2}, 4098),
            "does not divide into 4 equal parts (2 chunks x context 2); set batch.stream_tokens to "
            "4100 or 4096",
            id="cp2",
        ),
        pytest.param(
            {
                "context_parallel_size": 2,
                "tensor_model_parallel_size": 4,
                "sequence_parallel": True,
            },
            4100,
            "does not divide into 8 equal parts (context 2 x least common multiple of 2 chunks and "
            "tensor 4); set batch.stream_tokens to 4104 or 4096",
            id="cp2-tp4-sp",
        ),
    ],
)
def test_a_stream_that_context_parallelism_cannot_cut_is_refused_with_the_arithmetic(
    tmp_path: Path, parallel: dict[str, Any], tokens: int, message: str
) -> None:
    assert message in _refusal(tmp_path, parallel, stream_tokens=tokens)
    fits = _config(tmp_path, parallel, stream_tokens=4104)
    check_layout(fits, read_shape(fits))


def test_sequences_longer_than_the_model_has_positions_are_refused(tmp_path: Path) -> None:
    message = _refusal(tmp_path, stream_tokens=40961)
    assert "rollout.max_total_tokens = 40961" in message
    assert "max_position_embeddings = 40960" in message
    fits = _config(tmp_path, stream_tokens=40960)
    check_layout(fits, read_shape(fits))


def test_the_table_says_what_would_run(tmp_path: Path) -> None:
    printed = _printed(_config(tmp_path))
    assert "128 prompts x 8 rollouts = 1024" in printed
    assert "3 per trace at 40%-80%" in printed
    assert "supervised phase" not in printed
    supervised = _printed(_config(tmp_path, method="sft_then_rl"))
    assert re.search(r"supervised phase .* at most 16 epochs, 16 traces a step", supervised)


@pytest.mark.parametrize(
    ("dtype", "logits_dtype", "line"),
    [
        ("bfloat16", "float32", "policy bfloat16, logits float32 in trainer and engine"),
        ("bfloat16", "bfloat16", "policy bfloat16, logits bfloat16 in trainer and engine"),
        ("float32", "bfloat16", "policy float32, logits float32 in trainer and engine"),
    ],
)
def test_the_table_says_how_precise_logits_are(
    tmp_path: Path, dtype: str, logits_dtype: str, line: str
) -> None:
    settings = _config(tmp_path).model_dump()
    settings["model"]["logits_dtype"] = logits_dtype
    settings["policy"]["dtype"] = dtype
    settings["rollout"] |= {"sglang": {"dtype": dtype}, "transformers": {"dtype": dtype}}
    assert line in _printed(RunConfig.model_validate(settings))


@pytest.mark.parametrize(
    ("method", "missing"),
    [("rl", set()), ("sft_then_rl", {"traces"}), ("prefixrl", {"traces", "prefixes"})],
    ids=["rl", "sft_then_rl", "prefixrl"],
)
def test_inputs_that_are_not_there_yet_are_named(
    tmp_path: Path, method: str, missing: set[str]
) -> None:
    printed = _printed(_config(tmp_path, method=method))
    listed = printed.rpartition("not there yet: ")[2].strip().split(", ")
    folders = {str(tmp_path / "run" / name) for name in missing}
    assert set(listed) == {str(tmp_path / "p.jsonl")} | folders


def test_a_reference_of_another_shape_is_refused_and_a_missing_one_named(tmp_path: Path) -> None:
    config, folder = _config(tmp_path), tmp_path / "reference"
    loss = LossConfig(kl="k3", kl_coefficient=0.1, reference_path=folder)
    config = config.model_copy(update={"loss": loss})
    assert str(folder) in _printed(config).rpartition("not there yet: ")[2]
    folder.mkdir()
    same = QWEN3_4B | {"max_position_embeddings": 262144, "initializer_range": 0.01}
    (folder / "config.json").write_text(json.dumps(same))
    assert str(folder) not in _printed(config).rpartition("not there yet: ")[2]
    other = same | {"rope_theta": 5000000, "num_hidden_layers": 28}
    (folder / "config.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError) as refusal:
        _printed(config)
    assert (
        "it has num_layers 28 (the policy has 36), rotary_base 5000000.0 (the policy has "
        "1000000.0); name a folder"
    ) in str(refusal.value)


CP, DP = "context_parallel_size", "data_parallel_size"
PP, TP = "pipeline_model_parallel_size", "tensor_model_parallel_size"
ONE_NODE = {"tensor_model_parallel_size": 2, "data_parallel_size": 4, "sequence_parallel": True}


def test_it_says_that_a_config_fits_and_how_long_a_step_takes(tmp_path: Path) -> None:
    printed = _printed(_config(tmp_path, ONE_NODE, policy={"recompute": "full"}))
    found = re.search(r"^fits: ([0-9.]+) GiB in 72.00 GiB of --gpu-memory 80 GiB", printed, re.M)
    assert found is not None
    # 2.01e9 parameters of 18 bytes, and of 4 more while torch's AdamW steps them
    assert 41 < float(found[1]) < 42
    assert re.search(r"predicted step: [0-9.e+]+ s = rollout", printed)
    assert "assumed: 989.4 TFLOP/s a GPU, of it 40% in the update and 10% in sampling" in printed


def test_a_config_that_does_not_fit_names_the_knobs_with_what_they_would_do(tmp_path: Path) -> None:
    config = _config(tmp_path, ONE_NODE, stream_tokens=32_768)
    printed = _printed(config, memory_gib=60.0)
    assert "does not fit:" in printed
    knobs = dict(re.findall(r"^  (--\S+(?: \S+)?): [0-9.]+ GiB, (.*)$", printed, re.M))
    assert knobs == {
        "--policy.recompute full": "fits",
        "--policy.recompute selective": "does not fit",
        "--policy.optimizer.use-distributed-optimizer": "does not fit",
        "--policy.head.memory-gb 0.375": "does not fit",
    }
    assert "no single change is enough" not in printed
    assert "no single change is enough; --suggest" in _printed(config, memory_gib=20.0)


def test_host_memory_is_told_with_its_parts(tmp_path: Path) -> None:
    config = _config(tmp_path, ONE_NODE)
    loss = config.loss.model_copy(update={"kl": "k3", "kl_coefficient": 0.1})
    printed = _printed(config.model_copy(update={"loss": loss}))
    # 2.01e9 parameters: 4 bytes of reference, 28 in a save, 8 ranks a machine
    found = re.search(
        r"^host memory of a rank: at most ([0-9.]+) GiB = reference ([0-9.]+) \+ save ([0-9.]+) "
        r"\(of it ([0-9.]+) .*; 8 rank\(s\) a machine take up to ([0-9.]+)$",
        printed,
        re.M,
    )
    assert found is not None
    total, reference, save, written, machine = map(float, found.groups())
    assert reference == pytest.approx(7.5, abs=0.1)
    assert save == pytest.approx(7 * reference, abs=0.1)
    assert written == pytest.approx(save / 2, abs=0.01)
    assert total == pytest.approx(reference + save, abs=0.02)
    assert machine == pytest.approx(8 * total, abs=0.1)
    assert " + reference " in printed  # of the step's time


def test_every_stage_has_a_column(tmp_path: Path) -> None:
    printed = _printed(_config(tmp_path, {"pipeline_model_parallel_size": 4}))
    assert all(f"stage {stage}" in printed for stage in range(4))
    peaks = re.search(r"│ peak +│ (.*) │$", printed, re.M)
    assert peaks is not None
    values = [float(value) for value in peaks[1].split("│")]
    assert len(set(values)) == 4


def test_another_number_of_gpus_brings_layouts_as_lines_of_a_config(tmp_path: Path) -> None:
    printed = _printed(_config(tmp_path), num_gpus=16)
    assert "policy.parallel has 1 ranks, --gpus is 16" in printed
    sections = re.split(r"^# \d: .*$", printed, flags=re.M)[1:]
    assert len(sections) == 5
    for section in sections:
        lines = "\n".join(line.strip() for line in section.partition("not there")[0].splitlines())
        policy = PolicyConfig.model_validate(tomllib.loads(lines)["policy"])
        assert policy.parallel.world_size == 16
        assert policy.optimizer.use_distributed_optimizer


def test_the_layout_of_the_config_can_be_compared_with_others(tmp_path: Path) -> None:
    printed = _printed(_config(tmp_path, ONE_NODE), suggest=True)
    assert "predicted memory of a rank" in printed
    assert re.search(r"\d+ of \d+ layouts fit", printed)


@pytest.mark.parametrize(
    ("parallel", "policy", "stream_tokens", "num_knobs"),
    [
        # sequence parallelism between stages needs an even stream
        ({TP: 2, PP: 2}, {}, 4097, 3),
        ({TP: 2, PP: 2}, {}, 4096, 4),
        # 4097 tokens take a stream of 4100 under context parallelism
        ({CP: 2}, {"optimizer": {"use_distributed_optimizer": True}}, 8192, 4),
        ({}, {"recompute": "selective", "recompute_modules": ["mlp", "layernorm"]}, 4096, 2),
    ],
    ids=["odd stream", "even stream", "context parallel", "recomputed modules"],
)
def test_training_accepts_every_knob_that_is_named(
    tmp_path: Path,
    parallel: dict[str, Any],
    policy: dict[str, Any],
    stream_tokens: int,
    num_knobs: int,
) -> None:
    config = _config(tmp_path, parallel, policy=policy, stream_tokens=stream_tokens)
    if stream_tokens == 8192:
        rollout = config.rollout.model_copy(update={"max_total_tokens": 4097})
        batch = config.batch.model_copy(update={"stream_tokens": 8192})
        config = config.model_copy(update={"rollout": rollout, "batch": batch})
    named = re.findall(r"^  (--.*): [0-9.]+ GiB, ", _printed(config, memory_gib=1.0), re.M)
    assert len(named) == num_knobs
    for flags in named:
        changed = tyro.cli(RunConfig, default=config, args=flags.split())
        assert changed != config
        check_layout(changed, read_shape(changed))


def test_no_layout_that_fits_is_said_and_none_is_offered(tmp_path: Path) -> None:
    printed = _printed(_config(tmp_path), num_gpus=2, memory_gib=1.0)
    assert re.search(
        r"^no layout of 2 GPUs fits: the smallest needs [0-9.]+ GiB of 0\.90; take more GPUs",
        printed,
        re.M,
    )
    assert "[policy" not in printed
    assert "too large" in printed


def test_offered_lines_say_what_has_to_go(tmp_path: Path) -> None:
    policy = {"recompute": "selective", "recompute_modules": ["mlp"]}
    printed = _printed(_config(tmp_path, policy=policy), num_gpus=8)
    assert printed.count("# without recompute_modules") == printed.count("[policy]") == 5


def test_ranks_without_a_sequence_are_counted(tmp_path: Path) -> None:
    # A group of eight sequences of 4096 tokens does not fit into a stream: 1024 parts.
    many = _config(tmp_path, {DP: 1025})
    assert "1 of 1025 data-parallel ranks have nothing to do: 1024 rollouts are 1024" in _printed(
        many
    )
    assert "nothing to do" not in _printed(_config(tmp_path, {DP: 1024}))
    # Eight of 512 tokens do: 128 groups.
    assert "897 of 1025 data-parallel ranks" in _printed(many, mean_tokens=512.0)


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"num_gpus": 0}, "--gpus must be at least 1, got 0"),
        ({"num_gpus": -1}, "--gpus must be at least 1, got -1"),
        ({"memory_gib": 0.0}, "--gpu-memory must be GiB above 0, got 0"),
        ({"memory_gib": math.nan}, "--gpu-memory must be GiB above 0, got nan"),
        ({"reserved_fraction": 1.5}, "--reserved must be a fraction from 0 to below 1, got 1.5"),
        ({"reserved_fraction": -0.1}, "--reserved must be"),
        (
            {"assumptions": Assumptions(peak_flops=1e12, update_efficiency=0.0)},
            "--update-efficiency must be a fraction above 0, at most 1, got 0",
        ),
        (
            {"assumptions": Assumptions(peak_flops=1e12, rollout_efficiency=1.1)},
            "--rollout-efficiency must be a fraction above 0, at most 1, got 1.1",
        ),
    ],
    ids=lambda value: None,
)
def test_an_impossible_machine_is_refused(machine: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(MACHINE, **machine)


@pytest.mark.parametrize("mean", [0.5, 5000.0])
def test_a_mean_length_beyond_the_longest_is_refused(tmp_path: Path, mean: float) -> None:
    with pytest.raises(ConfigError, match=r"--mean-tokens must be between 1 and .* = 4096"):
        _printed(_config(tmp_path), mean_tokens=mean)


def test_shorter_sequences_shorten_the_step(tmp_path: Path) -> None:
    config = _config(tmp_path, ONE_NODE)
    seconds = [
        float(re.findall(r"predicted step: ([0-9.e+]+) s", _printed(config, mean_tokens=mean))[0])
        for mean in (4096.0, 1024.0)
    ]
    assert 0.2 < seconds[1] / seconds[0] < 0.25  # a quarter, and less attention


def test_the_peak_is_the_settings_or_the_data_sheets(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert gpu_flops(config, "NVIDIA H100 80GB HBM3") == 989.4e12
    assert gpu_flops(config, "A100") == 312e12
    with pytest.raises(ConfigError, match="--gpu 'abacus': no peak FLOPs are known"):
        gpu_flops(config, "abacus")
    trainer = config.trainer.model_copy(update={"peak_flops": 5e12})
    assert gpu_flops(config.model_copy(update={"trainer": trainer}), "abacus") == 5e12


@pytest.mark.parametrize(("num_ranks", "num_servers"), [(8, 1), (16, 16)])
def test_servers_of_several_nodes_are_on_all_of_them(
    tmp_path: Path, num_ranks: int, num_servers: int
) -> None:
    config = _config(tmp_path, {"data_parallel_size": num_ranks})
    rollout = config.rollout.model_copy(update={"colocated": True})
    printed = _printed(config.model_copy(update={"rollout": rollout}))
    assert f"{num_servers} server(s) on GPUs of the trainer" in printed
    assert f"sampling on {num_servers} GPU(s)" in printed


def test_min_servers_counts_those_of_all_nodes_or_of_their_own(tmp_path: Path) -> None:
    config = _config(tmp_path, {"data_parallel_size": 16})
    sglang = config.rollout.sglang.model_copy(update={"min_servers": 17})
    rollout = config.rollout.model_copy(update={"colocated": True, "sglang": sglang})
    config = config.model_copy(update={"rollout": rollout})
    with pytest.raises(ConfigError, match="got 17 > 16; lower it"):
        _printed(config)
    assert "17 server(s) on 17 GPUs of their own" in _printed(config, rollout_gpus=17)
