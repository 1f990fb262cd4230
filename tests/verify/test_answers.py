"""Finding the answer in a response."""

import pytest

from prime_train.verify.answers import extract_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{5} no, \boxed{6}", "6"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"\boxed{5} and then \boxed{6", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        ("Half of it.\n#### 1,234", "1,234"),
        ("#### 1\n#### 2\n", "2"),
        ("The answer is 5.", "5"),
        ("The answer is: 5. I am sure.", "5"),
        ("Final answer: $5.5$.", "$5.5$"),
        ("the answer is 4\nNo, the answer is 5", "5"),
        ("**The answer is 5**", "5"),
    ],
)
def test_answer_is_found(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    "response", ["", "5", r"\boxed{", r"\boxed{}", r"\boxed 5", "####", "the answer is", "answers are 5"]
)
def test_no_answer_is_found_where_none_is_given(response):
    assert extract_answer(response) is None


def test_boxes_of_one_statement_are_one_answer():
    assert extract_answer(r"$x=\boxed{1}$ or $x=\boxed{-2}$") == "1, -2"
    assert extract_answer(r"\boxed{1}, \boxed{2} and \boxed{3}") == "1, 2, 3"
    assert extract_answer(r"\boxed{1}. Now for the second part: \boxed{2}") == "2"


def test_order_of_forms_decides():
    response = "The answer is 1\n#### 2\n\\boxed{3}"
    assert [extract_answer(response, [form]) for form in ("answer_is", "hash", "boxed")] == ["1", "2", "3"]
    assert extract_answer(response, ("hash", "boxed")) == "2"
    assert extract_answer("The answer is 1", ("boxed", "hash")) is None
