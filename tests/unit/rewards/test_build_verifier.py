"""``reward.verifier``: the class is found by name or refused, and is held to its word."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from prefixrl_mcore.cli import main
from prefixrl_mcore.config.base import ConfigError, validate
from prefixrl_mcore.config.continuation import differing_settings, fixed_settings, settings_hash
from prefixrl_mcore.config.reward import RewardConfig
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.records import Verdict
from prefixrl_mcore.rewards.base import Verifier, VerifyRequest
from prefixrl_mcore.rewards.build import build_verifier, find_verifier, verify
from prefixrl_mcore.rewards.math_answer import MathVerifier
from tests.support.fake_verifier import FakeVerifier

PAGE = Path(__file__).parents[3] / "docs" / "rewards.md"
FAKE = "tests.support.fake_verifier:FakeVerifier"
LIMIT_SECONDS = 2.0


def request(answer: str, completion: str, *, prefix: str = "") -> VerifyRequest:
    return VerifyRequest(
        request_id="0/0/0",
        answer=answer,
        prefix_text=prefix,
        completion_text=completion,
        has_stopped=True,
    )


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that modules are imported from; they are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_verifier_of_the_page_works_as_the_page_says(modules: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (name,) = re.findall(r'verifier = "(.*)"', text)
    (modules / f"{name.partition(':')[0]}.py").write_text(code, encoding="utf-8")
    verifier = build_verifier(
        RewardConfig(verifier=name, timeout_seconds=LIMIT_SECONDS, num_workers=1)
    )
    try:
        requests = [
            request("[ab]+c", "so\nabac "),
            request("[ab]+c", "abac\nno"),
            request("(a|aa)*b", "a" * 60),  # exponential
            request("x", ""),
        ]
        verdicts = [(v.reward, v.reason) for v in verify(verifier, requests)]
        assert verdicts == [(1.0, "correct"), (0.0, "wrong"), (0.0, "timeout"), (0.0, "wrong")]
        assert verifier.find_answer([("a+", "first\naaa\nlast"), ("a+", "baa")]) == [True, False]
        valid, broken = verifier.check_references(["a+", "(a"])
        assert valid is None
        assert (broken or "").startswith("no regular expression: missing )")
        assert verifier.name == "pattern 1"
    finally:
        verifier.close()


def test_mathematics_is_the_default() -> None:
    assert find_verifier(RewardConfig()) is MathVerifier


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        pytest.param("gone:X", "", "No module named 'gone'; install .* PYTHONPATH", id="module"),
        pytest.param("there:X", "1 / 0", "raised ZeroDivisionError: division", id="import"),
        pytest.param("there:X", "Y = 1", r"there\.py has no class X", id="class"),
        pytest.param("there:X", "def X(config): ...", "has no class X", id="function"),
        pytest.param(
            "there:X",
            "class X:\n name = ''\n def verify(self, r): ...\n def close(self): ...\n",
            "lacks find_answer, check_references; a verifier has name, verify, find_answer, "
            "check_references, close",
            id="members",
        ),
    ],
)
def test_what_is_no_verifier_is_refused(modules: Path, name: str, code: str, message: str) -> None:
    (modules / "there.py").write_text(code)
    with pytest.raises(ConfigError, match=rf"^reward\.verifier = '{name}': .*{message}"):
        find_verifier(RewardConfig(verifier=name))


@pytest.mark.parametrize("name", ["math-verify", "module", "module:", ":X", "a..b:X", "a:b:c"])
def test_what_names_no_class_is_refused_when_the_config_is_read(name: str) -> None:
    with pytest.raises(ConfigError, match=r"must name a class as package\.module:Class, got"):
        validate(RewardConfig, {"verifier": name}, where="test")


@pytest.mark.parametrize("command", ["collect", "prefixes", "train", "eval", "check"])
def test_every_command_refuses_it_before_anything_else(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'run_folder = "{tmp_path}/run"\n[model]\npath = "{tmp_path}/none"\n'
        f'[data]\nproblems = "{tmp_path}/none.jsonl"\n[reward]\nverifier = "gone:X"\n'
    )
    assert main([command, str(config)]) == 2
    assert "error: reward.verifier = 'gone:X': importing gone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def run_config(**reward: object) -> RunConfig:
    return RunConfig.model_validate(
        {"run_folder": "r", "model": {"path": "m"}, "data": {"problems": "p"}, "reward": reward}
    )


def test_a_run_goes_on_with_the_verifier_that_it_began_with() -> None:
    saved = fixed_settings(run_config(verifier=FAKE))
    assert differing_settings(saved, run_config(verifier=FAKE)) == []
    (line,) = differing_settings(saved, run_config())
    assert line.startswith(f"reward.verifier: '{FAKE}' there, 'prefixrl_mcore.rewards.math_answer")
    assert settings_hash(run_config()) != settings_hash(run_config(verifier=FAKE))


def test_a_checkpoint_without_the_setting_judged_mathematics() -> None:
    saved = fixed_settings(run_config())
    del saved["reward.verifier"]
    assert differing_settings(saved, run_config()) == []
    assert differing_settings(saved, run_config(verifier=FAKE)) == [
        f"reward.verifier: not set there, '{FAKE}' now"
    ]


class Faulty(FakeVerifier):
    def __init__(self, verdicts: list[Verdict]) -> None:
        self._verdicts = verdicts

    def verify(self, requests: Sequence[VerifyRequest]) -> list[Verdict]:
        return self._verdicts


@pytest.mark.parametrize("rewards", [[], [1.0, 1.0]])
def test_another_number_of_verdicts_is_an_error(rewards: list[float]) -> None:
    verifier: Verifier = Faulty([Verdict(reward=reward, reason="") for reward in rewards])
    with pytest.raises(RuntimeError, match=f"fake 1.0: {len(rewards)} verdicts for 1 requests"):
        verify(verifier, [request("1", "1")])


@pytest.mark.parametrize("reward", [-1.0, 1.5, float("nan"), float("inf")])
def test_rewards_lie_between_0_and_1(reward: float) -> None:
    with pytest.raises(RuntimeError, match=rf"fake 1.0, 0/0/0: reward {reward}; expected 0"):
        verify(Faulty([Verdict(reward=reward, reason="")]), [request("1", "1")])


def test_rewards_between_are_taken_as_they_are() -> None:
    verdicts = [Verdict(reward=reward, reason="") for reward in (0.0, 0.25, 1.0)]
    assert verify(Faulty(verdicts), [request("1", "1")] * 3) == verdicts
