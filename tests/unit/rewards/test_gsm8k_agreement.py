"""Agreement of the verifier with the authors' labels of GSM8K model solutions.

The fixture holds the first 100 problems with four solutions each; see the licence beside it.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixrl_mcore.config.reward import RewardConfig
from prefixrl_mcore.rewards.base import VerifyRequest
from prefixrl_mcore.rewards.math_answer import MathVerifier

FIXTURE = Path(__file__).parents[2] / "fixtures" / "gsm8k_model_solutions_100.jsonl"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
FINAL_MARK = "A: "
NUM_LABELLED_CORRECT = 147
NUM_LABELLED_WRONG = 253


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in FIXTURE.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    verifier = MathVerifier(RewardConfig(timeout_seconds=60.0))
    yield verifier
    verifier.close()


def reference(row: dict) -> str:
    return row["ground_truth"].rpartition(FINAL_MARK)[2].strip()


def judge(
    verifier: MathVerifier, rows: list[dict], *, keep_final_line: bool
) -> Counter[tuple[bool, bool]]:
    """Count (label, verdict) over all solutions, with or without their line ``A: x``."""
    requests, labels = [], []
    for row in rows:
        for model in MODELS:
            text = row[model]["solution"]
            body = text.rpartition("\n" + FINAL_MARK)[0] or text
            requests.append(
                VerifyRequest(
                    request_id=model,
                    answer=reference(row),
                    prefix_text="",
                    completion_text=text if keep_final_line else body,
                    has_stopped=True,
                )
            )
            labels.append(row[model]["is_correct"])
    verdicts = verifier.verify(requests)
    return Counter(zip(labels, [verdict.reward == 1.0 for verdict in verdicts], strict=True))


def test_the_verifier_agrees_with_every_label(verifier: MathVerifier, rows: list[dict]) -> None:
    counts = judge(verifier, rows, keep_final_line=True)
    assert counts == {(True, True): NUM_LABELLED_CORRECT, (False, False): NUM_LABELLED_WRONG}


def test_without_the_final_line_the_last_number_misses_three(
    verifier: MathVerifier, rows: list[dict]
) -> None:
    """Three right solutions end in another number ("$15 for the 3 shirts"); none is invented."""
    assert judge(verifier, rows, keep_final_line=False) == {
        (True, True): NUM_LABELLED_CORRECT - 3,
        (True, False): 3,
        (False, False): NUM_LABELLED_WRONG,
    }


def test_every_reference_can_be_verified(verifier: MathVerifier, rows: list[dict]) -> None:
    complaints = verifier.check_references([reference(row) for row in rows])
    assert complaints == [None] * len(rows)
    assert len(rows) == 100
