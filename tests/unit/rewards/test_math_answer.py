r"""The verifier as the trainer sees it: verdicts in order, whatever a completion contains."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from prefixrl_mcore.config.reward import RewardConfig
from prefixrl_mcore.records import Verdict
from prefixrl_mcore.rewards.base import Verifier, VerifyRequest
from prefixrl_mcore.rewards.math_answer import MathVerifier
from tests.support.processes import is_running, wait_until_gone

LIMIT_SECONDS = 2.0
NUM_WORKERS = 2


def request(
    answer: str, completion: str, *, prefix: str = "", has_stopped: bool = True
) -> VerifyRequest:
    return VerifyRequest(
        request_id="0/0/0",
        answer=answer,
        prefix_text=prefix,
        completion_text=completion,
        has_stopped=has_stopped,
    )


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    verifier = MathVerifier(RewardConfig(timeout_seconds=30.0, num_workers=NUM_WORKERS))
    yield verifier
    verifier.close()


@pytest.fixture(scope="module")
def hasty() -> Iterator[MathVerifier]:
    verifier = MathVerifier(RewardConfig(timeout_seconds=LIMIT_SECONDS, num_workers=NUM_WORKERS))
    verifier.verify([request("1", "1")])
    yield verifier
    verifier.close()


def test_verdicts_come_in_order_with_reward_reason_and_answer(verifier: Verifier) -> None:
    completions = [r"\boxed{18}", r"\boxed{19}", "none", "the answer is 18", r"\boxed{36/2}"] * 30
    verdicts = verifier.verify([request("18", completion) for completion in completions])
    assert [(v.reward, v.reason, v.extracted) for v in verdicts] == [
        (1.0, "correct", "18"),
        (0.0, "wrong", "19"),
        (0.0, "no_answer", ""),
        (1.0, "correct", "18"),
        (1.0, "correct", "36/2"),
    ] * 30
    assert all(0.0 < verdict.seconds < 30.0 for verdict in verdicts)


def test_no_requests_give_no_verdicts(verifier: Verifier) -> None:
    assert verifier.verify([]) == []
    assert verifier.find_answer([]) == []


def test_the_name_says_which_rules_and_which_version(verifier: Verifier) -> None:
    assert verifier.name == "math-verify 0.9.0 final rules-1"


def test_only_the_completion_states_a_final_answer(verifier: Verifier) -> None:
    verdicts = verifier.verify(
        [
            request("18", "and we are done.", prefix=r"so \boxed{18} "),
            request("18", "8}.", prefix=r"so \boxed{1"),
            request("18", r"no: \boxed{19}", prefix=r"so \boxed{18} "),
            request("18", "8}.", prefix="x" * 100_000 + r"so \boxed{1"),
        ]
    )
    assert [verdict.reason for verdict in verdicts] == ["no_answer", "correct", "wrong", "correct"]


def test_a_completion_that_was_cut_off_has_no_last_number(verifier: Verifier) -> None:
    verdicts = verifier.verify(
        [
            request("18", "which makes 18", has_stopped=False),
            request("18", r"\boxed{18} which", has_stopped=False),
        ]
    )
    assert [verdict.reason for verdict in verdicts] == ["no_answer", "correct"]


def test_require_stop_refuses_what_did_not_end_by_itself() -> None:
    verifier = MathVerifier(RewardConfig(require_stop=True, num_workers=1, timeout_seconds=30.0))
    same = request("18", r"\boxed{18}", has_stopped=False)
    verdicts = verifier.verify([same, request("18", r"\boxed{18}"), same, request("18", "19")])
    verifier.close()
    assert verdicts[0] == verdicts[2] == Verdict(reward=0.0, reason="not_stopped")
    assert [verdict.reason for verdict in verdicts[1::2]] == ["correct", "wrong"]


def test_a_sequence_is_read_from_prefix_and_completion() -> None:
    config = RewardConfig(answer_form="sequence", num_workers=1, timeout_seconds=30.0)
    verifier = MathVerifier(config)
    prefix = "a 6 6 " + r"\boxed{1}" + " b 0 4 " + "x" * 10_000 + r"\boxed{0}"
    verdicts = verifier.verify(
        [
            request("1,0,2", r" c 8 7 \boxed{2}", prefix=prefix),
            request("1,0,2", r" c 8 7 \boxed{1}", prefix=prefix),
            request("1,0,2", r" c 8 7 \boxed{2} \boxed{2}", prefix=prefix),
            request("1,0,2", " c 8 7", prefix=prefix),
            request("1,0,2", r"\boxed{1} \boxed{0} \boxed{2}"),
            request("1,0,2", "c"),
        ]
    )
    found = verifier.find_answer([("1,0", prefix), ("1,0,2", prefix)])
    complaints = verifier.check_references(["1,0,2", "1,,2"])
    name = verifier.name
    verifier.close()
    assert [verdict.reason for verdict in verdicts] == [
        "correct",
        "wrong",
        "wrong",
        "wrong",
        "correct",
        "no_answer",
    ]
    assert found == [True, False]
    assert complaints == [None, "empty answer in '1,,2'"]
    assert name == "math-verify 0.9.0 sequence rules-1"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param("10^{10^{10}}", "timeout", id="tower"),
        pytest.param("9**9**9**9", "wrong", id="tower, python style"),
        pytest.param("1000000000!", "timeout", id="factorial"),
        pytest.param("(" * 200 + "1" + ")" * 200, None, id="parentheses"),
        pytest.param("\\frac{1}{\\sqrt{2}", "wrong", id="unbalanced latex"),
        pytest.param("\\frac{1}{1+" * 300 + "x" + "}" * 300, None, id="deep fractions"),
        pytest.param("{" * 500_000 + "}" * 500_000, "too_long", id="1 MB of braces"),
        pytest.param("{" * 1_000_000, "no_answer", id="1 MB of open braces"),
        pytest.param("7" * 200_000, "too_long", id="200k digits"),
        pytest.param("1\x002\x00", "wrong", id="nul bytes"),
        pytest.param("\ud800\udfff", "wrong", id="surrogates"),
    ],
)
def test_pathological_answers_are_wrong_within_the_limit_and_the_run_goes_on(
    hasty: MathVerifier, answer: str, reason: str | None
) -> None:
    started = time.monotonic()
    verdicts = hasty.verify(
        [
            request("18", r"\boxed{18}"),
            request("18", rf"so \boxed{{{answer}}}"),
            *[request("18", rf"\boxed{{{number}}}") for number in range(10, 30)],
        ]
    )
    elapsed = time.monotonic() - started
    assert verdicts[1].reward == 0.0
    assert verdicts[1].reason == reason or (reason is None and verdicts[1].reason != "correct")
    assert elapsed < LIMIT_SECONDS + 10.0  # the limit, and slack for a busy machine
    others = [verdicts[0], *verdicts[2:]]
    assert [verdict.reward for verdict in others] == [
        1.0,
        *[float(number == 18) for number in range(10, 30)],
    ]
    assert all(is_running(pid) for pid in hasty._pool.process_ids)
    assert len(hasty._pool.process_ids) == 1 + NUM_WORKERS


def test_timeouts_are_counted(hasty: MathVerifier) -> None:
    before = hasty.counters
    hasty.verify([request("18", r"\boxed{10^{10^{10}}}")])
    assert hasty.counters.num_timeouts == before.num_timeouts + 1
    assert hasty.counters.num_replaced == before.num_replaced + 1
    assert hasty.counters.num_payloads == before.num_payloads + 1


def test_an_unverifiable_reference_is_found_up_front(hasty: MathVerifier) -> None:
    assert hasty.check_reference("18") is None
    assert hasty.check_reference(r"\frac{1}{") is not None
    answers = ["18", "", "10^{10^{10}}", r"\text{even}"]
    complaints = hasty.check_references(answers)
    assert [complaint is None for complaint in complaints] == [True, False, False, True]
    assert complaints[2] == "unknown answer format: verifying it ended in timeout"


def test_an_unverifiable_reference_is_a_counted_verdict(verifier: Verifier) -> None:
    (verdict,) = verifier.verify([request(r"\frac{1}{", r"\boxed{18}")])
    assert (verdict.reward, verdict.reason) == (0.0, "bad_reference")


def test_find_answer_tells_statements_from_mere_numbers(verifier: Verifier) -> None:
    texts = [
        ("18", r"9 * 2 is \boxed{18}, let us check"),
        ("18", "9 * 2 = 18, so 18"),
        ("1/2", "the answer is 0.5."),
        ("1/2", r"the answer is \boxed{1}"),
    ]
    assert verifier.find_answer(texts) == [True, False, True, False]


def test_find_answer_survives_a_pathological_prefix(hasty: MathVerifier) -> None:
    texts = [("18", r"\boxed{10^{10^{10}}}"), ("18", r"\boxed{18}")]
    assert hasty.find_answer(texts) == [False, True]


def test_close_leaves_no_process() -> None:
    verifier = MathVerifier(RewardConfig(num_workers=1))
    verifier.verify([request("18", "18")])
    pids = verifier._pool.process_ids
    assert len(pids) == 2
    verifier.close()
    verifier.close()
    assert wait_until_gone(pids) == []


def test_the_parent_imports_neither_torch_nor_sympy() -> None:
    program = (
        "import sys, prefixrl_mcore.rewards.math_answer\n"
        "print(*sorted({'torch', 'sympy', 'math_verify', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""
