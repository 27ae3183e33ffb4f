import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf
from prefixrl_mcore.checkpoint.manifest import CheckpointError, begin_folder, seal_folder
from prefixrl_mcore.checkpoint.random_states import get_rng_state, set_rng_state
from prefixrl_mcore.checkpoint.retention import Retention
from prefixrl_mcore.checkpoint.run_checkpoints import read_trainer_state
from prefixrl_mcore.checkpoint.save_load import (
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from prefixrl_mcore.config.policy import OptimizerConfig
from prefixrl_mcore.policy.policy import MegatronPolicy
from tests.support.policies import build_policy, make_batch, max_difference, weights_of
from tests.support.tiny_models import (
    build_tiny_families,
    build_tiny_qwen3,
    write_model_folder,
    write_tiny_qwen3,
)

KIND_TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-7}
"""Of weights after two updates of 1e-3: the norm of gradients is summed in another order, which
may round a bfloat16 weight (below 2) to its neighbour."""

EXTRA_STATE = {"cursor": 7, "epochs": [1, 2], "flops": 1.5e18, "note": "é"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model"))


def schedule(*, is_sharded: bool = False) -> OptimizerConfig:
    """A schedule whose rate differs at every step, and weight decay."""
    return OptimizerConfig(
        lr=1e-3,
        schedule="linear",
        num_warmup_steps=2,
        weight_decay=0.1,
        clip_grad=1.0,
        use_distributed_optimizer=is_sharded,
    )


def assert_same_future(ours: MegatronPolicy, theirs: MegatronPolicy) -> None:
    """Two more updates give bitwise the same weights, losses and learning rates."""
    batch = make_batch()
    for _ in range(2):
        assert ours.update(batch) == theirs.update(batch)
    assert max_difference(weights_of(ours), weights_of(theirs)) == 0.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("num_updates", [0, 2])
def test_training_goes_on_as_if_it_had_not_stopped(
    source: Path, tmp_path: Path, dtype: str, is_sharded: bool, num_updates: int
) -> None:
    unbroken = build_policy(source, optimizer=schedule(is_sharded=is_sharded), dtype=dtype)
    for _ in range(num_updates):
        unbroken.update(make_batch())
    path = save_checkpoint(tmp_path, num_updates, unbroken, EXTRA_STATE)
    assert path == tmp_path / f"step-{num_updates:06d}"

    other = write_tiny_qwen3(tmp_path / "other weights", seed=5)
    resumed = build_policy(other, optimizer=schedule(is_sharded=is_sharded), dtype=dtype)
    resumed.update(make_batch())  # nothing of the present state may remain
    assert load_checkpoint(tmp_path, resumed) == (num_updates, EXTRA_STATE)
    assert resumed.policy_version == num_updates
    assert resumed.learning_rate == unbroken.learning_rate
    assert_same_future(resumed, unbroken)


def test_random_states_come_back(source: Path, tmp_path: Path) -> None:
    policy = build_policy(source)
    before = get_rng_state()
    path = save_checkpoint(tmp_path, 1, policy, {})
    draws = [random.random(), np.random.random(), torch.rand(1).item()]
    torch.manual_seed(99)
    load_checkpoint(path, policy)
    assert [random.random(), np.random.random(), torch.rand(1).item()] == draws
    set_rng_state(before)


def draw() -> list[float]:
    return [random.random(), np.random.random(), torch.rand(1).item()]


def test_another_layout_derives_random_states_from_seed_and_step(
    source: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = build_policy(source)
    before = get_rng_state()
    paths = [save_checkpoint(tmp_path, step, policy, {}) for step in (1, 2)]
    restored = draw()
    for path in paths:  # as if one rank of two virtual stages had saved, which there cannot be
        state = json.loads((path / "trainer.json").read_text())
        state["layout"]["vpp"] = 2
        (path / "trainer.json").write_text(json.dumps(state))
        reseal(path)
    draws: list[list[float]] = []
    for path in (paths[0], paths[1], paths[0]):
        torch.manual_seed(99)
        load_checkpoint(path, policy)
        draws.append(draw())
    assert draws[0] == draws[2]
    assert draws[0] != draws[1]
    assert restored not in draws
    assert "derived anew from seed 0 and step 1" in caplog.text
    set_rng_state(before)


def reseal(path: Path) -> None:
    """Give a checkpoint that was changed a manifest of what it now holds."""
    path.rename(path.with_name("changed"))
    temporary = begin_folder(path)
    for old in path.with_name("changed").iterdir():
        if old.name != "manifest.json":
            old.rename(temporary / old.name)
    seal_folder(temporary, path)
    shutil.rmtree(path.with_name("changed"))


@pytest.mark.parametrize("num_updates", [0, 1])
def test_saving_does_not_change_what_is_saved(
    source: Path, tmp_path: Path, num_updates: int
) -> None:
    policy, other = build_policy(source), build_policy(source)
    for _ in range(num_updates):
        policy.update(make_batch())
        other.update(make_batch())
    save_checkpoint(tmp_path, 1, policy, {})
    assert_same_future(policy, other)


def test_a_checkpoint_carries_config_and_tokenizer_as_bytes(source: Path, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, build_policy(source), EXTRA_STATE)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (path / "hf" / name).read_bytes() == (source / name).read_bytes()
    assert not list((path / "hf").glob("*.safetensors"))
    state = read_trainer_state(path)
    assert (state.step, state.policy_version, state.world_size) == (3, 0, 1)
    assert state.layout == {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "etp": 1, "dp": 1}
    assert state.extra_state == EXTRA_STATE


def test_a_policy_without_a_folder_saves_its_config(source: Path, tmp_path: Path) -> None:
    policy = build_policy(source)
    policy.model_files = {}
    path = save_checkpoint(tmp_path, 0, policy, {})
    assert json.loads((path / "hf" / "config.json").read_text()) == policy.hf_config


def test_a_checkpoint_carries_the_files_that_were_there_at_the_start(
    source: Path, tmp_path: Path
) -> None:
    """A model folder that is changed or removed in a run costs no save."""
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "pytorch_model.bin").symlink_to("blobs/pruned")  # of what is not copied
    policy = build_policy(folder)
    (folder / "config.json").write_text("{}")
    first = save_checkpoint(tmp_path / "run", 1, policy, {})
    shutil.rmtree(folder)
    second = save_checkpoint(tmp_path / "run", 2, policy, {})
    for path in (first, second):
        for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
            assert (path / "hf" / name).read_bytes() == (source / name).read_bytes()
        templates = path / "hf" / "additional_chat_templates"
        assert (templates / "tools.jinja").read_text() == "{{ tools }}"


def test_a_model_folder_that_could_not_be_saved_is_refused_before_the_run(
    source: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    (folder / "added.json").symlink_to("blobs/pruned")
    with pytest.raises(CheckpointError, match=r"added\.json: is a link to blobs/pruned"):
        build_policy(folder)


def test_only_the_last_checkpoints_are_kept(source: Path, tmp_path: Path) -> None:
    policy = build_policy(source)
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, policy, {}, Retention(keep_last=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000020", "step-000030"]
    # A run that went back to 20 and saves 25 keeps what was written last, not what counts most.
    save_checkpoint(tmp_path, 25, policy, {}, Retention(keep_last=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000025"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000025"


def test_the_latest_complete_checkpoint_is_found_without_its_pointer(
    source: Path, tmp_path: Path
) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    policy = build_policy(source)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, policy, {})
    (tmp_path / "latest").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000003"
    (tmp_path / "step-000003" / "trainer.json").write_text("")
    (tmp_path / "latest").write_text("step-000003\n")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000002"
    (tmp_path / "latest").write_text("step-000001\n")  # somebody wants to go back
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000001"


def test_looking_for_checkpoints_leaves_a_save_under_way_alone(tmp_path: Path) -> None:
    under_way = begin_folder(tmp_path / "step-000001")
    assert latest_checkpoint(tmp_path) is None
    assert under_way.is_dir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            lambda p: (p / "megatron/__0_0.distcp").write_bytes(b"x"), "got 1 bytes", id="truncated"
        ),
        pytest.param(lambda p: (p / "megatron/.metadata").unlink(), "is missing", id="missing"),
        pytest.param(lambda p: (p / "manifest.json").unlink(), "incomplete", id="no manifest"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_path_and_changes_nothing(
    source: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    policy = build_policy(source)
    path = save_checkpoint(tmp_path, 1, policy, {})
    damage(path)
    weights = weights_of(policy)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path, policy)
    assert str(path) in str(error.value)
    assert max_difference(weights_of(policy), weights) == 0.0


def test_a_missing_checkpoint_is_refused_by_path(source: Path, tmp_path: Path) -> None:
    policy = build_policy(source)
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint folder"):
        load_checkpoint(tmp_path / "nowhere", policy)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        load_checkpoint(tmp_path, policy)


def test_another_model_is_refused_by_the_fields_that_differ(source: Path, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, build_policy(source), {})
    wider = write_model_folder(build_tiny_qwen3(ffn_size=64), tmp_path / "wider")
    with pytest.raises(CheckpointError, match="ffn_hidden_size got 128, expected 64") as error:
        load_checkpoint(path, build_policy(wider))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe", "llama-3"])
def test_the_same_model_as_another_transformers_writes_it_is_loaded(
    tmp_path: Path, family: str
) -> None:
    source = write_model_folder(build_tiny_families()[family], tmp_path / "model")
    path = save_checkpoint(tmp_path / "run", 1, build_policy(source), EXTRA_STATE)
    other = build_policy(source)
    other.hf_config = as_transformers_4(other.hf_config)
    assert load_checkpoint(path, other) == (1, EXTRA_STATE)


def as_transformers_4(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Return a file of transformers 5 as the releases before wrote it."""
    old = dict(hf_config)
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        old["rope_scaling"] = {key: v for key, v in rope.items() if key != "rope_theta"}
    if "num_local_experts" in old:
        old["num_experts"] = old.pop("num_local_experts")
    if old["model_type"] == "llama":
        del old["head_dim"]
    assert old.keys() != hf_config.keys()
    return old


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        pytest.param("qwen3-moe", {"num_experts_per_tok": 3}, "mixture got", id="top-k"),
        pytest.param("qwen3-moe", {"norm_topk_prob": False}, "mixture got", id="renormalised"),
        pytest.param("llama-3", {"rope_parameters": None}, "rotary_scaling got", id="scaling"),
        pytest.param("qwen3", {"rms_norm_eps": 0.5}, "layernorm_epsilon got", id="epsilon"),
    ],
)
def test_settings_that_change_no_shape_are_compared_too(
    tmp_path: Path, family: str, change: dict[str, object], message: str
) -> None:
    source = write_model_folder(build_tiny_families()[family], tmp_path / "model")
    path = save_checkpoint(tmp_path / "run", 1, build_policy(source), EXTRA_STATE)
    other = build_policy(source)
    theta = other.hf_config["rope_parameters"]["rope_theta"]
    other.hf_config = other.hf_config | {"rope_theta": theta} | change
    with pytest.raises(CheckpointError, match=f"belongs to another model than .*: {message}"):
        load_checkpoint(path, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("to_sharded", [False, True], ids=["to plain", "to distributed"])
@pytest.mark.parametrize("num_updates", [0, 2])
def test_optimizer_state_moves_between_plain_and_distributed(
    source: Path, tmp_path: Path, dtype: str, to_sharded: bool, num_updates: int
) -> None:
    unbroken = build_policy(source, optimizer=schedule(is_sharded=not to_sharded), dtype=dtype)
    for _ in range(num_updates):
        unbroken.update(make_batch())
    path = save_checkpoint(tmp_path, num_updates, unbroken, EXTRA_STATE)

    other = write_tiny_qwen3(tmp_path / "other weights", seed=5)
    moved = build_policy(other, optimizer=schedule(is_sharded=to_sharded), dtype=dtype)
    moved.update(make_batch())  # nothing of the present state may remain
    load_checkpoint(path, moved)
    assert max_difference(weights_of(moved), weights_of(unbroken)) == 0.0
    batch = make_batch()
    for _ in range(2):
        ours, theirs = moved.update(batch), unbroken.update(batch)
        assert ours.learning_rate == theirs.learning_rate
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-5)
    assert max_difference(weights_of(moved), weights_of(unbroken)) < KIND_TOLERANCE[dtype]
    assert_same_step(moved, num_updates + 2)
    # And back again: a tensor that lost its place on the way would not be found.
    save_checkpoint(tmp_path, num_updates + 2, moved, EXTRA_STATE)
    load_checkpoint(tmp_path, unbroken)
    assert max_difference(weights_of(moved), weights_of(unbroken)) == 0.0


def assert_same_step(policy: MegatronPolicy, expected: int) -> None:
    """Adam has counted each update once, for every parameter."""
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        steps = {float(state["step"]) for state in part.optimizer.state.values()}
        assert steps == {float(expected)}


def test_another_precision_is_refused(source: Path, tmp_path: Path) -> None:
    """A bfloat16 model's weights are rounded; a float32 model would silently begin from them."""
    path = save_checkpoint(tmp_path, 1, build_policy(source, dtype="bfloat16"), {})
    policy = build_policy(source)
    weights = weights_of(policy)
    with pytest.raises(CheckpointError, match=r"optimizer\.state\.fp32_param.*same precision"):
        load_checkpoint(path, policy)
    assert max_difference(weights_of(policy), weights) == 0.0


@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_converted_folder_starts_training_like_the_folder_itself(
    source: Path, tmp_path: Path, dtype: str, is_sharded: bool
) -> None:
    convert_from_hf(source, tmp_path / "start")
    other = write_tiny_qwen3(tmp_path / "other weights", seed=5)
    policy = build_policy(other, optimizer=schedule(is_sharded=is_sharded), dtype=dtype)
    assert load_checkpoint(tmp_path / "start", policy) == (0, {})
    expected = build_policy(source, optimizer=schedule(is_sharded=is_sharded), dtype=dtype)
    assert max_difference(weights_of(policy), weights_of(expected)) == 0.0
    assert_same_future(policy, expected)


@pytest.mark.parametrize("value", [{"x": float("nan")}, {"x": object()}, {"x": {1, 2}}])
def test_extra_state_that_is_not_json_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, value: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match="extra_state of checkpoint step 4 is not JSON"):
        save_checkpoint(tmp_path, 4, build_policy(source), value)
    assert list(tmp_path.iterdir()) == []


def test_a_negative_step_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        save_checkpoint(tmp_path, -1, build_policy(source), {})
    assert list(tmp_path.iterdir()) == []
