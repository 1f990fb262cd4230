"""Curves of runs."""

import json

import pytest

from prime_train import cli
from prime_train.show.report import draw


def run(directory, steps=4):
    """A directory with the metrics of a run."""
    directory.mkdir()
    lines = [{"step": 0, "eval/greedy": 0.1}]
    for step in range(1, steps + 1):
        lines.append({"step": step, "accuracy/before_filter": step / 10, "prm/loss": 0.7, "time/rollout": 1.0})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_two_runs_are_drawn_over_each_other_in_one_picture(tmp_path, capsys):
    first, second = run(tmp_path / "first"), run(tmp_path / "second", steps=30)
    out = tmp_path / "both.png"
    assert cli.main(["report", str(first), str(second), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert is_picture(out)
    assert [path.name for path in tmp_path.rglob("*.png")] == ["both.png"]


def test_a_picture_stands_in_the_first_runs_directory_unless_told_otherwise(tmp_path):
    first = run(tmp_path / "first")
    assert draw([first]) == first / "report.png"
    assert is_picture(first / "report.png")


def test_a_run_without_metrics_is_refused_by_name(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"nowhere has no metrics\.jsonl"):
        draw([tmp_path / "nowhere"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(tmp_path / "nowhere")])
    assert stopped.value.code == 1
    assert "nowhere has no metrics.jsonl" in capsys.readouterr().err
