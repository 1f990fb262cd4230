"""Code answers: finding the program, reading tests, comparing outputs, scoring."""

import json

import pytest

from prime_train.verify.code import extract_code, parse_tests, same_output, same_value, score_code
from prime_train.verify.problems import read_humaneval, read_mbpp
from tests.support.verify_data import data_file, sandbox_or_skip

DOUBLE = json.dumps({"inputs": [f"{i}\n" for i in range(12)], "outputs": [f"{2 * i}\n" for i in range(12)]})


def fenced(code: str) -> str:
    return f"Here it is.\n```python\n{code}\n```\n"


def score(code: str, reference: str, deadline_s: float = 20.0) -> float:
    value, status, _ = score_code(sandbox_or_skip(), fenced(code), reference, deadline_s)
    assert status == "ok"
    return value


def test_last_python_block_is_the_answer():
    assert extract_code("```python\n1\n```\nand\n```python\n2\n```\n```text\n3\n```") == "2\n"
    assert extract_code("```Python3\n1\n```") == "1\n"
    assert extract_code("```py\nx = '```'\n```") == "x = '```'\n"
    assert extract_code("```python\n1\n") == "1\n"
    assert extract_code("print(1)") is None
    assert extract_code("```\nprint(1)\n```") is None


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True), ("1  2 \n\n3\n", "1 2\n3\n", True), ("1\n2\n3", "1 2\n3", False),
        ("YES", "yes", False), ("0.3333333", "0.333333333", True), ("0.33", "0.333333333", False),
        ("1e-7", "0.0", True), ("2", "2.0", True), ("2.0", "2", False), ("2.0000001", "2", False), ("nan", "0.5", False),
        ("inf", "1.5", False), ("1_0.0", "10.0", False), ("", "1", False), ("1", "", False), ("", "", True),
        ("1000000.9", "1000000.0", True), ("1000002.0", "1000000.0", False), ("1e400", "1.0", False),
        ("1\r\n2\r\n", "1\n2", True),
    ],
)  # fmt: skip
def test_printed_output_is_compared_as_in_the_apps_family(actual, expected, same):
    assert same_output(actual, expected) is same


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ([1, 2], [1, 2], True), ([1, 2], [2, 1], False), (1.0000001, 1.0, True), (1.1, 1.0, False), ("1", 1, False),
        ({"a": [0.5]}, {"a": [0.5000001]}, True), ({"a": 1}, {"a": 1, "b": 2}, False), (None, None, True), (None, 0, False),
        (3.0000001, 3, False), (float("inf"), 1.5, False), (10**400, 1.5, False),
    ],
)  # fmt: skip
def test_returned_values_are_compared_as_plain_data(actual, expected, same):
    assert same_value(actual, expected) is same


@pytest.mark.parametrize(
    "reference",
    [
        "", "not json", "[]", "{}", "3", '{"inputs": ["1"], "outputs": []}', '{"inputs": [], "outputs": []}',
        '{"inputs": "1", "outputs": "2"}', '{"inputs": [3], "outputs": [4], "fn_name": "f"}', '[{"input": "1"}]',
    ],
)  # fmt: skip
def test_unreadable_tests_are_refused_with_a_reason(reference):
    with pytest.raises(ValueError, match=r".+"):
        parse_tests(reference)


def test_forms_of_tests_are_read():
    assert [t.request for t in parse_tests('{"inputs": [["1", "2"]], "outputs": ["3"]}')] == [{"stdin": "1\n2"}]
    assert [t.expected for t in parse_tests('[{"input": "1", "output": "2"}]')] == ["2"]
    assert parse_tests(json.dumps(DOUBLE))[3].expected == "6\n"
    call = parse_tests('{"inputs": ["1\\n[2]"], "outputs": ["3"], "fn_name": "f"}')[0]
    assert (call.request, call.expected) == ({"call": "f", "args": [1, [2]]}, 3)
    keys = parse_tests('{"inputs": [[{"1": 2}]], "outputs": [3], "fn_name": "f"}')[0]
    assert keys.request["args"] == [{1: 2}]


def test_program_that_passes_every_test_scores_one():
    assert score("print(2 * int(input()))", DOUBLE) == 1.0
    assert score("import sys\nsys.stdout.write(str(2 * int(sys.stdin.read())))\nsys.exit(0)", DOUBLE) == 1.0
    assert score("if __name__ == '__main__':\n    print(2 * int(open(0).readline()))\n    exit()", DOUBLE) == 1.0


def test_other_programs_score_the_share_of_the_first_ten_tests():
    assert score("n = int(input())\nprint(2 * n if n < 5 else 0)", DOUBLE) == 0.5
    assert score("print(0)", DOUBLE) == 0.1
    assert score("syntax error", DOUBLE) == 0.0
    assert score("print(2 * int(input()))\nraise ValueError", DOUBLE) == 0.0


def test_program_that_fails_only_a_later_test_scores_less_than_one():
    assert score("n = int(input())\nprint(2 * n if n < 11 else 0)", DOUBLE) == 10 / 11


def test_response_without_code_scores_zero():
    assert score_code(sandbox_or_skip(), "print(2 * int(input()))", DOUBLE, 5.0) == (0.0, "ok", "")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(a, b):\n    return a + b", 1.0),
        ("class Solution:\n    def f(self, a, b):\n        return a + b", 1.0),
        ("def f(a, b):\n    print('noise')\n    return a + b", 1.0),
        ("import numpy\ndef f(a, b):\n    return numpy.array([a, b]).sum()", 1.0),
        ("def f(a, b):\n    return str(a + b)", 0.0),
        ("def g(a, b):\n    return a + b", 0.0),
        ("print(3)", 0.0),
    ],
)
def test_function_is_called_and_its_value_compared(code, expected):
    reference = json.dumps({"fn_name": "f", "inputs": [[1, 2], [5, 5]], "outputs": [3, [10]]})
    assert score(code, reference) == expected


def test_tuples_are_lists_and_sets_are_not_ordered_data():
    reference = json.dumps({"fn_name": "f", "inputs": [[]], "outputs": [[1, 2]]})
    assert score("def f(): return (1, 2)", reference) == 1.0
    assert score("def f(): return lambda: 0", reference) == 0.0


def test_tests_that_time_out_fail_and_the_others_count():
    code = "n = int(input())\nwhile n == 3: pass\nprint(2 * n)"
    assert score_code(sandbox_or_skip(), fenced(code), DOUBLE, 20.0)[:2] == (0.9, "timeout")


def test_deadline_of_an_answer_cuts_its_remaining_tests_off():
    code = "n = int(input())\nwhile n > 1: pass\nprint(2 * n)"
    assert score_code(sandbox_or_skip(), fenced(code), DOUBLE, 3.0)[:2] == (0.2, "timeout")


def test_expected_outputs_are_not_in_the_sandbox():
    """Neither in what the program can reach, nor anywhere in the memory of the process that it runs in."""
    secret = "the-output-that-is-expected"
    look = "import gc\nprint([o for o in gc.get_objects() if 'is-expected' in repr(o)[:10000]][:0] or 'nothing')"
    assert score(look, json.dumps({"inputs": [""], "outputs": ["nothing"]})) == 1.0
    requests = [test.request for test in parse_tests(json.dumps({"inputs": [""], "outputs": [secret]}))]
    assert secret not in json.dumps(requests)


def problems(name: str):
    return (
        read_humaneval(data_file("humaneval__HumanEval.jsonl.gz"))
        if name == "HumanEval"
        else read_mbpp(data_file("mbpp__new_mbpp.json"))
    )


def mutated(solution: str) -> str:
    """The same functions, each of which returns something else."""
    return f"{solution}\n\nfor _f in [f for f in list(globals().values()) if type(f) is type(lambda: 0)]:\n" + (
        "    globals()[_f.__name__] = lambda *a, _f=_f, **k: ('mutated', _f(*a, **k))\n"
    )


@pytest.mark.parametrize("name", ["HumanEval", "MBPP"])
def test_canonical_solution_passes_and_a_mutated_one_fails(name):
    for problem in problems(name)[::40]:
        assert score(problem.solution, problem.reference) == 1.0, problem.id
        assert score(mutated(problem.solution), problem.reference) < 1.0, problem.id


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["HumanEval", "MBPP"])
def test_every_canonical_solution_passes_and_every_mutated_one_fails(name):
    from prime_train.verify import Answer, VerifierPool

    sandbox_or_skip()
    rows = problems(name)
    # One published solution computes for six seconds on an idle machine.
    with VerifierPool(workers=2, deadline_s=90.0, test_seconds=30.0) as pool:
        for change, right in ((str, True), (mutated, False)):
            answers = [
                Answer(
                    id=p.id, prompt=p.prompt, response=fenced(change(p.solution)), ability="code", reference=p.reference
                )
                for p in rows
            ]
            verdicts = pool.verify(answers)
            assert not [v.id for v in verdicts if (v.score == 1.0) is not right]


def test_assertions_are_judged_where_the_candidate_cannot_reach():
    reference = json.dumps({"asserts": ["assert f(2) == 4", "assert f(3) == 9"], "names": ["f"]})
    assert score("def f(n): return n * n", reference) == 1.0
    assert score("def f(n): return 4", reference) == 0.5
    always = "class A:\n    def __eq__(self, other): return True\ndef f(n): return A()"
    assert score(always, reference) == 0.0
    subclass = "class A(int):\n    def __eq__(self, other): return True\ndef f(n): return A(7)"
    assert score(subclass, reference) == 0.0
    assert score("import sys, os\ndef f(n): os._exit(0)", reference) == 0.0
    assert score("def f(n): raise SystemExit(0)", reference) == 0.0
    assert score("import builtins\nbuiltins.AssertionError = Exception\ndef f(n): return 0", reference) == 0.0


@pytest.mark.parametrize(
    "search",
    [
        "for o in gc.get_objects():\n        if isinstance(o, dict) and 'asserts' in o: seen.append(str(o))",
        "f = sys._getframe()\n    while f: seen.append(str(f.f_locals)); f = f.f_back",
        "sys.stdin.seek(0); seen.append(sys.stdin.read())",
    ],
)
def test_assertions_are_not_in_the_candidates_memory(search):
    code = f"import gc, sys\ndef f():\n    seen = []\n    {search}\n    return 'unseen' if 'the-sec' + 'ret' not in str(seen) else 1"
    reference = json.dumps({"asserts": ["secret = 'the-secret'\nassert f() == 'unseen'"], "names": ["f"]})
    assert score(code, reference) == 1.0


def test_assertions_may_pass_values_back_to_the_answer():
    reference = json.dumps({"asserts": ["assert total([Pair(1, 2), Pair(3, 4)]) == 10"], "names": ["total", "Pair"]})
    code = "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef total(ps): return sum(p.a + p.b for p in ps)"
    assert score(code, reference) == 1.0
