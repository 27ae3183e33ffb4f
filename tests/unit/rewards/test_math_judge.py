r"""Equality of answers, reading of sequences, and the check of references."""

import pytest

from prefixrl_mcore.rewards.math_judge import (
    MAX_ANSWER_CHARS,
    check,
    compare,
    judge,
    judge_final,
    judge_sequence,
    split_parts,
    states_answer,
)


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        pytest.param("18", "18", id="literally"),
        pytest.param("18", "018", id="leading zero"),
        pytest.param("18", "18.00", id="decimal zeros"),
        pytest.param("18", "$18", id="currency"),
        pytest.param("18", r"\$18", id="escaped currency"),
        pytest.param("18", "18.", id="full stop"),
        pytest.param("18", "**18**", id="markdown"),
        pytest.param("18", "<<9*2=18>>18", id="calculator annotation"),
        pytest.param("-3", "-3.0", id="negative"),
        pytest.param("-3", "\u22123", id="unicode minus"),
        pytest.param(r"-\frac{3}{4}", "-0.75", id="negative fraction"),
        pytest.param("1/2", r"\frac12", id="slash fraction"),
        pytest.param(r"\frac{1}{2}", r"\dfrac{2}{4}", id="reduced"),
        pytest.param(r"\frac{1}{2}", ".5", id="decimal without zero"),
        pytest.param("7/2", r"3\frac{1}{2}", id="mixed, latex"),
        pytest.param("3.5", "3 1/2", id="mixed, text"),
        pytest.param("1/3", "0.333333", id="six decimals suffice"),
        pytest.param("50\\%", "0.5", id="percent as a fraction"),
        pytest.param("50\\%", "50", id="percent sign left out"),
        pytest.param("12.5%", "1/8", id="percent without backslash"),
        pytest.param("1234", "1,234", id="thousands, comma"),
        pytest.param("1,234,567", "1234567", id="thousands in the reference"),
        pytest.param("1234", "1 234", id="thousands, blank"),
        pytest.param("10000", r"10\,000", id="thousands, thin space"),
        pytest.param("10000", "10{,}000", id="thousands, braces"),
        pytest.param("1,234.5", "1234.50", id="thousands and decimals"),
        pytest.param("100000", "1e5", id="scientific"),
        pytest.param("5", r"5 \text{ cm}", id="unit, latex"),
        pytest.param("5", "5 cm", id="unit, text"),
        pytest.param("18", "18 dollars per day", id="unit, words"),
        pytest.param("5", r"5 \text{ cm}^2", id="squared unit"),
        pytest.param(r"90^\circ", "90", id="degrees"),
        pytest.param("90", "90\u00b0", id="unicode degrees"),
        pytest.param(r"\{1, 2, 3\}", "3, 2, 1", id="a set has no order"),
        pytest.param("1, 2", r"2 \text{ and } 1", id="set, and"),
        pytest.param(r"\pm 3", "3, -3", id="plus minus"),
        pytest.param("(1, 2]", r"\left( 1, 2 \right]", id="half-open interval"),
        pytest.param(r"(-\infty, 3)", "(-\u221e, 3)", id="infinite interval"),
        pytest.param(r"(-\infty, 1) \cup (2, \infty)", r"(2,\infty)\cup(-\infty,1)", id="union"),
        pytest.param("(3, 4)", "(3,4)", id="pair"),
        pytest.param("x = 5", "5", id="reference names the variable"),
        pytest.param("5", "x = 5", id="answer names the variable"),
        pytest.param("x^2+2x+1", "(x+1)^2", id="factored"),
        pytest.param(r"\sqrt{8}", r"2\sqrt{2}", id="radical"),
        pytest.param(r"\frac{\pi}{2}", "\u03c0/2", id="unicode pi"),
        pytest.param("2^{10}", "1024", id="power"),
        pytest.param(
            r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}", id="vector"
        ),
        pytest.param("A", r"\text{(A)}", id="choice"),
        pytest.param(r"\text{Tuesday}", "tuesday", id="word"),
        pytest.param("Yes", "yes.", id="short word"),
        pytest.param("xyz", "x y z", id="a short word may be a product"),
        pytest.param("10:30 am", "10:30 AM", id="time of day"),
        pytest.param(r"$\frac{1}{2}$", r"\(\frac{1}{2}\)", id="delimiters"),
    ],
)
def test_equal_answers(reference: str, candidate: str) -> None:
    assert compare(reference, candidate) == "correct"


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        pytest.param("18", "19", id="integers"),
        pytest.param("-3", "3", id="sign"),
        pytest.param("1/3", "0.333", id="rounded too far"),
        pytest.param("50\\%", "5", id="percent"),
        pytest.param("1234", "1.234", id="decimal point is no separator"),
        pytest.param("1,2", "12", id="list is no number"),
        pytest.param("3", "1 2", id="two numbers are not their sum"),
        pytest.param("235", "1 234", id="nor with a thousands separator"),
        pytest.param("1", "1, 2", id="hedging with a list"),
        pytest.param("1", "1 or 2", id="hedging with or"),
        pytest.param(r"\{1, 2, 3\}", "1, 2", id="incomplete set"),
        pytest.param("(3, 4)", "(4, 3)", id="a pair has an order"),
        pytest.param("(1, 2]", "[1, 2)", id="other interval"),
        pytest.param("x^2", "x^3", id="expression"),
        pytest.param("x", "y", id="variable"),
        pytest.param("Tuesday", "yadseut", id="anagram"),
        pytest.param("Tuesday", "Monday", id="word"),
        pytest.param("A", "(B)", id="choice"),
        pytest.param("10:30", "11:33", id="times of day are no ratios"),
        pytest.param("18", "", id="empty"),
        pytest.param("18", r"\frac{1}{", id="unbalanced"),
        pytest.param("18", "1\x008", id="nul byte"),
        pytest.param("18", "\ud800", id="lone surrogate"),
    ],
)
def test_different_answers(reference: str, candidate: str) -> None:
    assert compare(reference, candidate) == "wrong"


def test_very_long_answers_are_not_parsed_but_may_be_literally_right() -> None:
    long_answer = "7" * (MAX_ANSWER_CHARS + 1)
    assert compare("18", long_answer) == "too_long"
    assert compare(long_answer, f" {long_answer} ") == "correct"


def test_the_integer_shortcut_agrees_with_math_verify() -> None:
    for reference, candidate in [("12", "12.0"), ("1,000", "1000.0"), ("-5", "-5.0"), ("7", "8.0")]:
        by_shortcut = compare(reference, candidate.removesuffix(".0"))
        assert by_shortcut == compare(reference, candidate)


def test_an_unknown_reference_is_not_the_answers_fault() -> None:
    assert compare(r"\frac{1}{", "18") == "bad_reference"
    assert judge_final(r"\frac{1}{", r"\boxed{18}", start=0, has_stopped=True)[0] == "bad_reference"


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (r"\boxed{18}", ("correct", "18")),
        (r"\boxed{19}", ("wrong", "19")),
        (r"\boxed{}", ("no_answer", "")),
        ("nothing", ("no_answer", "")),
        ("", ("no_answer", "")),
    ],
)
def test_final_verdicts_name_reason_and_answer(text: str, verdict: tuple[str, str]) -> None:
    assert judge_final("18", text, start=0, has_stopped=True) == verdict


@pytest.mark.parametrize(
    ("reference", "text", "reason"),
    [
        pytest.param("1,0,2", r"\boxed{1} x \boxed{0} y \boxed{2}", "correct", id="all right"),
        pytest.param("1,0,2", r"\boxed{1} \boxed{2} \boxed{0}", "wrong", id="order matters"),
        pytest.param("1,0,2", r"\boxed{1} \boxed{0}", "wrong", id="one missing"),
        pytest.param("1,0,2", r"\boxed{1}\boxed{0}\boxed{2}\boxed{2}", "wrong", id="one too many"),
        pytest.param("1,0,2", r"\boxed{1}\boxed{0}\boxed{2", "wrong", id="last one unclosed"),
        pytest.param("1,0,2", "1, 0, 2", "no_answer", id="no box"),
        pytest.param("1/2, 3", r"\boxed{0.5} \boxed{3.0}", "correct", id="parts by math-verify"),
        pytest.param("(1,2), 3", r"\boxed{(1,2)} \boxed{3}", "correct", id="commas in brackets"),
        pytest.param("5", r"\boxed{5}", "correct", id="one part"),
        pytest.param("1,1", r"\boxed{1}\boxed{1}", "correct", id="equal parts are two parts"),
    ],
)
def test_sequence_verdicts(reference: str, text: str, reason: str) -> None:
    assert judge_sequence(reference, text)[0] == reason


def test_sequence_extracts_all_boxes() -> None:
    assert judge_sequence("1,2", r"\boxed{1} \boxed{3}") == ("wrong", "1, 3")


def test_parts_split_at_outer_commas_only() -> None:
    assert split_parts(r"1, (2, 3), \frac{4}{5,0}, [6,7)") == [
        "1",
        "(2, 3)",
        r"\frac{4}{5,0}",
        "[6,7)",
    ]
    assert split_parts("5") == ["5"]
    assert split_parts("1,,2") == ["1", "", "2"]


@pytest.mark.parametrize(
    "reference",
    [
        r"18",
        r"1,234",
        r"1/2",
        r"\frac{1}{2}",
        r"(-\infty, 3]",
        r"x = 5",
        r"Tuesday",
        r"\text{even}",
        r"A",
        r"5 cm",
        r"12 \text{ hours}",
        r"10:30",
        r"2\pi r",
        r"5 or 6",
        r"\$18",
        r"50%",
    ],
)
def test_known_reference_formats_pass(reference: str) -> None:
    assert check("final", reference) is None


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ("", "empty answer"),
        ("  ", "empty answer"),
        (r"\frac{1}{2", "cannot read"),
        ("1. ??", "cannot read"),
        ("3 apples and 2 pears", "mixes words and numbers"),
        ("1/0", "equal to itself"),
        ("7" * 5000, "5000 characters"),
    ],
)
def test_unknown_reference_formats_are_named(reference: str, complaint: str) -> None:
    assert complaint in str(check("final", reference))


def test_every_part_of_a_sequence_reference_is_checked() -> None:
    assert check("sequence", "1, 2, (3,4)") is None
    assert check("sequence", "1,,2") == "empty answer in '1,,2'"
    assert "cannot read" in str(check("sequence", r"1, \frac{1}{"))


@pytest.mark.parametrize(
    ("text", "states"),
    [
        pytest.param(r"so \boxed{18}. Let us check: 9 * 2", True, id="boxed"),
        pytest.param(r"\boxed{36/2}, no wait, \boxed{19}", True, id="an earlier box"),
        pytest.param("The answer is 18. Let us check.", True, id="phrase"),
        pytest.param("the answer is 18.0 dollars, or is the answer 19?", True, id="earlier phrase"),
        pytest.param("#### 18", True, id="gsm8k"),
        pytest.param("She sells 18 eggs. 9 * 2 = 18", False, id="the number occurs"),
        pytest.param(r"\boxed{19} and 18", False, id="other box"),
        pytest.param(r"\boxed{18", False, id="box not closed"),
        pytest.param("", False, id="empty"),
    ],
)
def test_a_text_states_the_answer_only_by_box_or_phrase(text: str, states: bool) -> None:
    assert states_answer("final", "18", text) is states


def test_a_text_states_a_sequence_only_with_all_its_parts() -> None:
    assert not states_answer("sequence", "1,2,3", r"\boxed{1} \boxed{2}")
    assert states_answer("sequence", "1,2,3", r"\boxed{1} \boxed{2} \boxed{3} and")
    assert not states_answer("sequence", "1,2,3", r"\boxed{1} \boxed{2} \boxed{2}")


def test_a_set_stated_in_two_boxes_counts() -> None:
    assert states_answer("final", "1, 2", r"\boxed{1} and \boxed{2}")


def test_an_unknown_payload_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown payload"):
        judge(["no such job"])
