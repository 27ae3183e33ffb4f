r"""The extraction rules: boxes, then phrases, then the last number; only behind the prefix."""

import time

import pytest

from prefixrl_mcore.rewards.extract import find_boxes, find_final, find_phrases


def final(text: str, *, start: int = 0, has_stopped: bool = True) -> str | None:
    statement = find_final(text, start=start, has_stopped=has_stopped)
    return None if statement is None else statement.text


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        pytest.param(r"so \boxed{18}.", ["18"], id="plain"),
        pytest.param(r"\boxed{\frac{1}{2}}", [r"\frac{1}{2}"], id="nested braces"),
        pytest.param(r"\boxed{ 1 } then \fbox{2}", ["1", "2"], id="two, blanks dropped"),
        pytest.param(r"\boxed{\boxed{3}}", [r"\boxed{3}"], id="the outer one counts"),
        pytest.param(r"\boxed{\{1, 2\}}", [r"\{1, 2\}"], id="escaped braces are no braces"),
        pytest.param(r"} { \boxed{5} }", ["5"], id="stray braces around"),
        pytest.param(r"\boxed{1} and \boxed{2", ["1"], id="an unclosed box says nothing"),
        pytest.param(r"\boxed{1 and \boxed{2}", ["2"], id="closed inside an unclosed one"),
        pytest.param(r"\boxed {7}", ["7"], id="blank before the brace"),
        pytest.param(r"\boxed 7, \boxedx{8}, boxed{9}", [], id="no box"),
        pytest.param(r"\boxed{}", [""], id="empty"),
        pytest.param("", [], id="no text"),
    ],
)
def test_boxes(text: str, boxes: list[str]) -> None:
    assert [box.text for box in find_boxes(text)] == boxes


def test_a_box_knows_where_it_stands() -> None:
    text = r"so \boxed{18}."
    (box,) = find_boxes(text)
    assert text[box.start : box.end] == r"\boxed{18}"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        pytest.param("She has 4.\n#### 18", "18", id="gsm8k reference"),
        pytest.param("#### -1,234.5", "-1,234.5", id="sign, separator, decimals"),
        pytest.param("9 * 2 = 18\nA: 18", "18", id="gsm8k model solution"),
        pytest.param("9 * 2 = 18\nA: $18 per day", "$18", id="currency and unit"),
        pytest.param("The answer is 12 apples for 3 people.", "12", id="a number, then words"),
        pytest.param("The answer is 3/4 of the cake.", "3/4", id="fraction, then words"),
        pytest.param("The answer is 50% of 8.", "50%", id="percent, then words"),
        pytest.param("The final answer is: **18**", "18", id="markdown"),
        pytest.param("Answer: 18.", "18", id="full stop"),
        pytest.param("the answer is 2.5.", "2.5", id="decimal and full stop"),
        pytest.param("**Answer:** $\\frac{1}{2}$ of it", "\\frac{1}{2}", id="maths, then words"),
        pytest.param("Final answer:\n\\[\n\\frac{1}{2}\n\\]", "\\frac{1}{2}", id="display"),
        pytest.param("the answer is \\(x^2\\) or so", "x^2", id="inline"),
        pytest.param("The answer is x = 5", "x = 5", id="bare maths"),
        pytest.param("The answer is (3, \\infty).", "(3, \\infty)", id="bare interval"),
        pytest.param("The answer is 5 and 6.", "5 and 6", id="two numbers"),
        pytest.param("The answer is Tuesday.", "Tuesday", id="a word"),
        pytest.param("the answer to the problem is 7.", "7", id="answer to the problem"),
        pytest.param("## Final Answer\n\n42", "42", id="heading"),
        pytest.param("Answer: 3\nNo. Answer: 4", "4", id="the last phrase counts"),
        pytest.param("The answer is $5 for eggs and $6 for milk", "$5", id="prices are no maths"),
    ],
)
def test_phrases_state_an_answer(text: str, answer: str) -> None:
    assert final(text, has_stopped=False) == answer


@pytest.mark.parametrize(
    "text",
    [
        "Answer: let us add 5 and 3",
        "The answer is the sum of 5 and 6",
        "The answer is not 5",
        "the answer isn't 5",
        "I answered 5 questions",
        "The answer is",
        "ABA: 7",
        "### 5",
        "The answer is 5x per day",
    ],
)
def test_phrases_before_prose_state_nothing(text: str) -> None:
    assert list(find_phrases(text)) == []


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        pytest.param("9*2 = $<<9*2=18>>18 a day", "18", id="behind an annotation"),
        pytest.param("it costs $5 and then $6.", "$6", id="the last number"),
        pytest.param("so it is $\\frac{3}{4}$.", "\\frac{3}{4}", id="inline maths ends later"),
        pytest.param("so $\\frac{3}{4}$ of 8", "8", id="a number ends later"),
        pytest.param("from -1,250.75 to .5", ".5", id="leading point"),
        pytest.param("we get x2 and y_3", None, id="names are no numbers"),
        pytest.param("no number at all", None, id="nothing"),
    ],
)
def test_the_last_number_is_the_last_resort(text: str, answer: str | None) -> None:
    assert final(text) == answer
    assert final(text, has_stopped=False) is None


def test_boxes_outrank_phrases_and_phrases_outrank_numbers() -> None:
    assert final(r"\boxed{1}. The answer is 2. And 3") == "1"
    assert final("The answer is 2. And 3") == "2"
    assert final("2. And 3") == "3"


def test_adjacent_boxes_are_one_answer() -> None:
    assert final(r"$\boxed{1}$ and $\boxed{2}$") == "1, 2"
    assert final(r"\boxed{1}, \text{ or } \boxed{2}, \boxed{3}") == "1, 2, 3"
    assert final(r"\boxed{4}" + "\n\n" + r"\boxed{4}") == "4"
    assert final(r"\boxed{1} is a first step, then \boxed{2}") == "2"


@pytest.mark.parametrize(
    ("prefix", "completion", "answer"),
    [
        pytest.param(r"so \boxed{1", r"8}.", "18", id="a box that the completion closes"),
        pytest.param("the answer is 1", "8 apples", "18", id="a phrase that it finishes"),
        pytest.param("and so 1", "8", "18", id="a number that it finishes"),
        pytest.param(r"\boxed{1} and ", r"\boxed{2}", "1, 2", id="boxes side by side"),
        pytest.param(r"so \boxed{18}", " is it.", None, id="a box of the prefix alone"),
        pytest.param("The answer is 18", " apples.", None, id="a phrase of the prefix alone"),
        pytest.param("so 18", " it is", None, id="a number of the prefix alone"),
        pytest.param(r"\boxed{1}", "no, 2", "2", id="only a number behind a box of the prefix"),
    ],
)
def test_a_statement_counts_if_it_ends_in_the_completion(
    prefix: str, completion: str, answer: str | None
) -> None:
    assert final(prefix + completion, start=len(prefix)) == answer


@pytest.mark.parametrize(
    "unit",
    [
        "\\boxed{",
        "{",
        "}",
        "$",
        "$1 ",
        "#",
        "#### ",
        "answer is ",
        "answer to ",
        "A:\n",
        "1,111",
        "\\[",
        "\\(",
        "- ",
        " ",
        "\n",
        "*_",
        "answer ",
        "<<",
        "\\boxed{1} and ",
        "$$",
    ],
)
def test_time_grows_with_the_length_and_not_with_its_square(unit: str) -> None:
    text = unit * (300_000 // len(unit))
    started = time.process_time()
    find_final(text, start=0, has_stopped=True)
    list(find_phrases(text))
    assert time.process_time() - started < 3.0  # about 0.2; a quadratic rule takes minutes
