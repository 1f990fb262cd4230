"""prime-train verify: a file of responses in, a file of scores out."""

import json
import subprocess
import sys

import pytest

from prime_train.verify.command import main, parse_line
from tests.support.paths import ROOT
from tests.support.verify_data import sandbox_or_skip

TESTS = {"inputs": ["1\n", "2\n"], "outputs": ["2", "4"]}
PROGRAM = "```python\nprint(2 * int(input()))\n```"


@pytest.fixture
def verify(tmp_path, capfd):
    """Runs the command on rows; (exit status, rows of the output, what it said)."""

    def run(rows: list, *options: str):
        file, out = tmp_path / "responses.jsonl", tmp_path / "scores.jsonl"
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        status = main([str(file), "--out", str(out), "--workers", "1", "--deadline", "5", *options])
        scores = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        return status, scores, capfd.readouterr().err

    return run


def test_math_answers_are_scored_in_order(verify):
    status, scores, said = verify(
        [
            {"id": "a", "response": r"\boxed{0.5}", "reference": r"\frac12"},
            {"id": "b", "response": r"\boxed{2}", "reference": r"\frac12"},
            {"id": 3, "response": r"\boxed{2}", "reference": 2, "ability": "math"},
        ]
    )
    assert status == 0
    assert [(row["id"], row["score"], row["status"]) for row in scores] == [
        ("a", 1.0, "ok"),
        ("b", 0.0, "ok"),
        ("3", 1.0, "ok"),
    ]
    assert all(set(row) == {"id", "score", "status", "seconds"} for row in scores)
    assert "3 scored, mean 0.667, 0 timed out, 0 errors, 0 refused, 0 unreadable lines" in said


def test_code_answers_are_scored(verify):
    sandbox_or_skip()
    as_list = [{"input": "1\n", "output": "2"}, {"input": "2\n", "output": "5"}]
    status, scores, _ = verify(
        [
            {"id": "text", "response": PROGRAM, "ground_truth": json.dumps(TESTS)},
            {"id": "object", "response": PROGRAM, "ground_truth": TESTS, "ability": "code"},
            {"id": "list", "response": PROGRAM, "ground_truth": as_list},
        ]
    )
    assert status == 0
    assert [(row["id"], row["score"]) for row in scores] == [("text", 1.0), ("object", 1.0), ("list", 0.5)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "not JSON"), ("[1]", "wanted a JSON object"), ('{"response": "x", "reference": "1"}', "`id` is missing"),
        ('{"id": "x", "reference": "1"}', "`response` is missing"), ('{"id": "x", "response": "y"}', "`reference` is missing"),
        ('{"id": "x", "response": 3, "reference": "1"}', "`response` must be a text"),
        ('{"id": [1], "response": "", "reference": "1"}', "`id` must be"),
        ('{"id": "x", "response": "", "reference": ""}', "`reference` is empty"),
        ('{"id": "x", "response": "", "reference": "1", "ability": "law"}', "`ability` must be math or code"),
        ('{"id": "x", "response": "", "ground_truth": "{}"}', "need `inputs` and `outputs`"),
        ('{"id": "x", "response": "", "ability": "code"}', "`ground_truth` is missing"),
    ],
)  # fmt: skip
def test_line_that_cannot_be_read_is_explained(line, message):
    with pytest.raises(ValueError, match=message):
        parse_line(line)


def test_bad_lines_are_named_by_their_numbers_and_the_rest_is_scored(verify):
    good = {"id": "good", "response": r"\boxed{5}", "reference": "5"}
    status, scores, said = verify([good, "", "not json", good, {"id": "x"}])
    assert status == 1
    assert [row["score"] for row in scores] == [1.0, 1.0]
    assert "line 3: not JSON" in said
    assert "line 5: `response` is missing" in said
    assert "2 unreadable lines" in said


def test_missing_file_and_bad_setting_are_told(verify, tmp_path, capfd):
    assert main([str(tmp_path / "absent.jsonl")]) == 2
    assert "absent.jsonl" in capfd.readouterr().err
    status, _, said = verify([], "--custom", "no.such:thing")
    assert status == 2
    assert "no.such" in said


def test_empty_file_has_no_scores(verify):
    assert verify([])[:2] == (0, [])


def test_custom_verifier_and_order_of_forms_can_be_named(verify):
    row = {"id": "a", "response": "The answer is 1\n\\boxed{2}", "reference": "1"}
    assert verify([row], "--extract", "answer_is", "boxed")[1][0]["score"] == 1.0
    assert verify([row | {"reference": "3"}], "--custom", "tests.verify.test_pool:misbehave")[1][0]["score"] == 1.0


def test_ground_truth_of_a_math_line_is_its_reference():
    assert parse_line('{"id": 1, "response": "", "ground_truth": "5", "ability": "math"}').reference == "5"


def test_it_runs_as_a_module_and_writes_to_standard_output(tmp_path):
    file = tmp_path / "responses.jsonl"
    file.write_text(json.dumps({"id": "a", "response": r"\boxed{5}", "reference": "5"}) + "\n")
    command = [sys.executable, "-m", "prime_train.verify.command", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["score"] == 1.0
