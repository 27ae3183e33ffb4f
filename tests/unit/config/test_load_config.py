"""Loading of configs: strictness, flags, cross-field rules, JSON round trip."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prefixrl_mcore.config.base import ConfigError, read_toml, validate
from prefixrl_mcore.config.load import dump_json, load_config, with_settings
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.demo.settings import TaskConfig

CONFIGS = Path(__file__).parents[3] / "configs"
MINIMAL = 'run_folder = "r"\n[model]\npath = "m"\n[data]\nproblems = "p.jsonl"\n'


def _load(folder: Path, text: str, *flags: str) -> RunConfig:
    path = folder / "run.toml"
    path.write_text(text)
    return load_config(RunConfig, path, list(flags))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.toml")), ids=lambda p: p.name)
def test_every_config_file_loads(path: Path) -> None:
    config_cls = TaskConfig if path.name == "task.toml" else RunConfig
    assert validate(config_cls, read_toml(path), where=str(path))


def test_there_are_config_files() -> None:
    assert len(list(CONFIGS.rglob("*.toml"))) >= 4


def test_the_paper_recipe_is_the_default(tmp_path: Path) -> None:
    config = _load(tmp_path, MINIMAL)
    assert (config.batch.prompts_per_step, config.batch.group_size) == (128, 8)
    assert config.prefixes.num_per_trace == 3
    assert (config.prefixes.min_fraction, config.prefixes.max_fraction) == (0.4, 0.8)
    assert config.policy.optimizer.lr == 1e-6
    assert config.policy.optimizer.clip_grad == 1.0
    assert (config.rollout.temperature, config.evaluation.temperature) == (1.0, 0.7)
    assert (config.rollout.max_completion_tokens, config.rollout.max_total_tokens) == (16384, 36000)
    assert (config.loss.baseline, config.loss.normalize_std) == ("mean", False)
    assert (config.loss.importance, config.loss.aggregation) == ("none", "token_mean")
    assert config.collect.max_tries == 2500


def test_a_flag_overrides_the_file(tmp_path: Path) -> None:
    text = MINIMAL + "[policy.optimizer]\nlr = 1e-5\n"
    assert _load(tmp_path, text).policy.optimizer.lr == 1e-5
    assert _load(tmp_path, text, "--policy.optimizer.lr", "3e-4").policy.optimizer.lr == 3e-4


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.temperatur: unknown key.*'temperature'"):
        _load(tmp_path, MINIMAL + "[rollout]\ntemperatur = 1.0\n")


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.problems: required"):
        _load(tmp_path, 'run_folder = "r"\n[model]\npath = "m"\n[data]\n')


def test_a_value_out_of_range_is_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch\.group_size.*got 1"):
        _load(tmp_path, MINIMAL + "[batch]\ngroup_size = 1\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[prefixes]\nmin_fraction=0.9\nmax_fraction=0.5\n", "0.9 > 0.5", id="cuts"),
        pytest.param("[batch]\nstream_tokens=100\n", "100 < 36000", id="stream"),
        pytest.param("[rollout]\nmax_completion_tokens=36000\n", "36000 >= 36000", id="room"),
        pytest.param(
            "[policy.parallel]\nsequence_parallel=true\n", "tensor_model_parallel", id="sp"
        ),
        pytest.param(
            "[rollout.sglang]\nextra_args=['--enable-fp32-lm-head']\n",
            r"rollout\.sglang\.extra_args .* --enable-fp32-lm-head; set model\.logits_dtype",
            id="flag",
        ),
        pytest.param(
            "[rollout]\ntop_p=0.9\n", r"rollout\.top_p .* log-probs of the whole", id="top-p"
        ),
        pytest.param("[rollout]\ntop_k=50\n", r"rollout\.top_k .* leave it out", id="top-k"),
        pytest.param(
            "[rollout.sglang]\nextra_args=['--dtype=float32']\n",
            r"must not have --dtype; set rollout\.sglang\.dtype",
            id="dtype",
        ),
    ],
)
def test_cross_field_rules_say_values_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, MINIMAL + text)


def test_the_reference_beside_a_supervised_warm_up_is_named(tmp_path: Path) -> None:
    text = MINIMAL + '[loss]\nkl = "k3"\nkl_coefficient = 0.1\n'
    assert _load(tmp_path, text).loss.reference_path is None
    text = f'method = "sft_then_rl"\n{text}'
    with pytest.raises(ConfigError, match=r"needs loss\.reference_path, got none: .* warm-up"):
        _load(tmp_path, text)
    assert _load(tmp_path, text + 'reference_path = "m"\n').loss.reference_path == Path("m")


def test_the_supervised_learning_rate_falls_to_the_same_floor(tmp_path: Path) -> None:
    text = 'method = "sft_then_rl"\n' + MINIMAL + "[sft]\nlr = 1e-7\n"
    text += "[policy.optimizer]\nmin_lr = 2e-7\n"
    assert _load(tmp_path, text).sft.lr == 1e-7  # a constant rate has no floor
    falling = text + 'schedule = "cosine"\n'
    with pytest.raises(ConfigError, match=r"sft\.lr must be .* got 1e-07 < 2e-07: both phases"):
        _load(tmp_path, falling)
    assert _load(tmp_path, falling.replace('"sft_then_rl"', '"rl"')).sft.lr == 1e-7  # not used


ROUNDED = MINIMAL.replace("[data]", 'logits_dtype = "bfloat16"\n[data]')


@pytest.mark.parametrize(
    ("policy", "rollout", "message"),
    [
        pytest.param(
            "float32",
            "engine='sglang'",
            r'"bfloat16" .* policy\.dtype = "float32" and rollout\.sglang\.dtype = "bfloat16" '
            r'.* make the two equal, or set model\.logits_dtype = "float32"',
            id="only the server rounds",
        ),
        pytest.param(
            "bfloat16",
            "engine='sglang'\nsglang={dtype='float32'}",
            r'policy\.dtype = "bfloat16" and rollout\.sglang\.dtype = "float32"',
            id="only the trainer rounds",
        ),
        pytest.param(
            "bfloat16",
            "",
            r'rollout\.transformers\.dtype = "float32".*engine = None; None may use either engine',
            id="the fallback does not round",
        ),
    ],
)
def test_logits_that_one_side_would_round_are_refused(
    tmp_path: Path, policy: str, rollout: str, message: str
) -> None:
    text = f"[policy]\ndtype='{policy}'\n[rollout]\n{rollout}\n"
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, ROUNDED + text)
    assert _load(tmp_path, MINIMAL + text).model.logits_dtype == "float32"


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param("[rollout]\nengine='sglang'\n", id="server"),
        pytest.param("[rollout]\ntransformers={dtype='bfloat16'}\n", id="either engine"),
        pytest.param(
            "[policy]\ndtype='float32'\n[rollout]\nsglang={dtype='float32'}\n",
            id="nothing to round",
        ),
    ],
)
def test_logits_that_both_sides_round_are_accepted(tmp_path: Path, rest: str) -> None:
    assert _load(tmp_path, ROUNDED + rest).model.logits_dtype == "bfloat16"


def test_a_flag_is_checked_by_the_same_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        _load(tmp_path, MINIMAL, "--prefixes.min-fraction", "0.95")
    assert stopped.value.code == 2
    assert "0.95 > 0.8" in capsys.readouterr().err


def test_a_misspelled_flag_gets_a_suggestion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        _load(tmp_path, MINIMAL, "--policy.optimizer.rl", "1e-5")
    assert stopped.value.code == 2
    assert "--policy.optimizer.lr" in capsys.readouterr().err


def test_broken_toml_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml: not valid TOML"):
        _load(tmp_path, "run_folder = \n")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(RunConfig, tmp_path / "none.toml", [])


def test_json_round_trip_is_equal(tmp_path: Path) -> None:
    config = _load(tmp_path, MINIMAL + "[metrics]\nwandb = { project = 'x' }\n")
    assert validate(RunConfig, json.loads(dump_json(config)), where="json") == config


def test_the_config_is_frozen(tmp_path: Path) -> None:
    config = _load(tmp_path, MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # pyright: ignore[reportAttributeAccessIssue]  # that is the test


def test_configs_load_without_torch() -> None:
    code = (
        "import sys, prefixrl_mcore.config.load, prefixrl_mcore.config.run, prefixrl_mcore.cli;"
        "import prefixrl_mcore.records, prefixrl_mcore.launch.check;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        pytest.param(
            "every_steps = 20\nkeep_every_steps = 30",
            r"keep_every_steps must be a multiple of checkpoint\.every_steps, got 30 and 20",
            id="steps that are never saved",
        ),
        pytest.param(
            'keep_best = { metric = "eval/dev/accuracy" }',
            r"'eval/dev/accuracy', which no evaluation .* eval/train/accuracy, .*eval/aime/",
            id="unknown set",
        ),
        pytest.param(
            'keep_best = { metric = "eval/train/reward" }',
            "which no evaluation of this run makes",
            id="unknown quantity",
        ),
        pytest.param(
            'every_steps = 15\nkeep_best = { metric = "eval/train/accuracy" }',
            r"every_steps must be a multiple of evaluation\.every_steps.* 15 and 10",
            id="checkpoints without an evaluation",
        ),
    ],
)
def test_retention_that_cannot_work_is_refused(tmp_path: Path, lines: str, message: str) -> None:
    text = MINIMAL + f'held_out = {{ aime = "a.jsonl" }}\n[checkpoint]\n{lines}\n'
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, text)


def test_the_best_by_a_held_out_metric_can_be_kept(tmp_path: Path) -> None:
    text = MINIMAL + (
        'held_out = { aime = "a.jsonl" }\n[checkpoint]\nkeep_every_steps = 100\n'
        'keep_best = { metric = "eval/aime/accuracy", num = 2 }\n'
    )
    best = _load(tmp_path, text).checkpoint.keep_best
    assert best is not None
    assert (best.metric, best.mode, best.num) == ("eval/aime/accuracy", "max", 2)


def test_rules_beside_keeping_everything_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = MINIMAL + "[checkpoint]\nkeep_every_steps = 50\n"
    with pytest.raises(SystemExit) as stopped:
        _load(tmp_path, text, "--checkpoint.keep-last", "None")
    assert stopped.value.code == 2
    assert "keep_last = None keeps every checkpoint" in capsys.readouterr().err


def test_settings_are_written_as_in_toml_and_may_be_bare_words() -> None:
    values = {"trainer": {"num_steps": 4}, "method": "rl"}
    changed = with_settings(
        values,
        ["trainer.num_steps=7", "policy.parallel.sequence_parallel=true", "run_folder=runs/a=b",
         "data.held_out={ a = 'b' }", 'method="prefixrl"'],
    )  # fmt: skip
    assert changed == {
        "trainer": {"num_steps": 7},
        "method": "prefixrl",
        "policy": {"parallel": {"sequence_parallel": True}},
        "run_folder": "runs/a=b",
        "data": {"held_out": {"a": "b"}},
    }
    assert values == {"trainer": {"num_steps": 4}, "method": "rl"}


@pytest.mark.parametrize("setting", ["num_steps", "--trainer.num-steps=3", "method.a=1", "=3"])
def test_a_setting_without_key_or_value_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError):
        with_settings({"method": "rl"}, [setting])


def test_a_dumped_config_is_a_config_file(tmp_path: Path) -> None:
    config = load_config(RunConfig, CONFIGS / "demo" / "run.toml", [])
    (tmp_path / "config.json").write_text(dump_json(config))
    assert load_config(RunConfig, tmp_path / "config.json", []) == config
    flags = ["--trainer.num-steps", "3"]
    assert load_config(RunConfig, tmp_path / "config.json", flags).trainer.num_steps == 3
