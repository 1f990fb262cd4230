"""The quickstart, as its user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.quickstart import draw, page_blocks
from prime_train.run.directory import read_records


def prime_train(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "prime_train", *words], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quickstart_learns_and_then_says_that_it_is_complete(tmp_path: Path):
    run = tmp_path / "run"
    said = prime_train("run", "quickstart", "--run.dir", str(run))
    evaluated = [record for record in read_records(run / "metrics.jsonl") if "eval/sampled" in record]
    assert evaluated[-1]["eval/sampled"] >= evaluated[0]["eval/sampled"] + 0.3
    assert evaluated[-1]["eval/greedy"] > evaluated[0]["eval/greedy"]
    assert str(run / "report.png") in said
    assert (run / "report.png").stat().st_size > 10_000
    assert "complete" in prime_train("run", "quickstart", "--run.dir", str(run))
    assert "sampled" in prime_train("eval", "quickstart", "--run.dir", str(run))


def test_blocks_have_the_mean_and_range_of_the_seeds_and_the_picture(tmp_path: Path):
    def run(variant: str, seed: int, last: float) -> dict:
        curve = [(0, 0.1), (12, 0.5), (24, last)]
        evaluations = [{"step": step, "eval/sampled": value, "eval/greedy": value / 2} for step, value in curve]
        return {
            "variant": variant, "seed": seed, "with_sft": variant == "PRIME", "seconds": 200.0 + seed,
            "evaluations": evaluations, "pairwise_accuracy": [],
        }  # fmt: skip

    runs = [run(variant, seed, 0.8 + seed / 10) for seed in (0, 1) for variant in ("PRIME", "outcome only")]
    for name, content in (("z-2026-01-01", "older"), ("a-2026-01-02", json.dumps({"cpus": 2, "runs": runs}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "quickstart.json").write_text(content)
    picture = tmp_path / "a-2026-01-02" / "quickstart.png"
    draw(runs, picture)
    blocks = page_blocks(tmp_path)
    block = blocks["quickstart"](tmp_path)
    assert "| SFT model | 10% (10–10) | 5% (5–5) |" in block
    assert "| PRIME, 24 steps | 85% (80–90) | 42% (40–45) |" in block
    assert "200 to 201 s on 2 CPU cores" in block
    assert picture.stat().st_size > 5_000
    assert blocks["quickstart-picture"](tmp_path).endswith("(a-2026-01-02/quickstart.png)")
