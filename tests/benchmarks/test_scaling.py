"""The scaling benchmark's predictions and how they are shown."""

import json
import sys
from dataclasses import asdict

from benchmarks import scaling
from benchmarks.scaling import SHAPES, Measured, architecture, assumptions, predict, tables
from prime_train.plan.sizes import sizes_of


def test_shapes_have_the_parameters_of_their_names():
    found = {model: sizes_of(architecture(model)).parameters / 1e9 for model in SHAPES}
    assert {model: round(n, 1) for model, n in found.items()} == {"7B": 7.6, "32B": 32.8, "72B": 72.7}


def test_predictions_grow_with_gpus_and_are_marked_as_such():
    few, many = predict(["7B"], [8, 64])
    assert few.fits
    assert many.fits
    assert many.gib <= few.gib
    assert many.tokens_per_s > few.tokens_per_s
    assert 0 < few.mfu < 0.4  # of a peak of which it is assumed that 40% are reached
    measured = [Measured(processes=1, status="ok", seconds=2.0, tokens_per_s=100.0), Measured(processes=2, status="no")]
    shown = tables(
        {
            "environment": {"hardware": "two cores"}, "measured": [asdict(row) for row in measured],
            "predicted": [asdict(few), asdict(many)], "assumptions": assumptions(),
        }
    )  # fmt: skip
    assert "Predicted by the plan's model: not measured" in shown
    assert "| 1 | 2.00 | 100 | ok |" in shown
    assert "| 2 | – | – | no |" in shown
    assert "assumed" in shown


def test_what_does_not_fit_is_said_not_to():
    (row,) = predict(["72B"], [8])
    assert not row.fits


def test_predicting_alone_keeps_what_was_measured(tmp_path, monkeypatch):
    measured = [asdict(Measured(processes=1, status="ok", seconds=2.0, tokens_per_s=100.0))]
    before = {"environment": {"hardware": "elsewhere"}, "measured": measured, "predicted": [], "assumptions": []}
    (tmp_path / "scaling.json").write_text(json.dumps(before))
    (row,) = predict(["7B"], [8])
    monkeypatch.setattr(scaling, "predict", lambda: [row])
    monkeypatch.setattr(sys, "argv", ["scaling", "--out", str(tmp_path), "--processes"])
    scaling.main()
    after = json.loads((tmp_path / "scaling.json").read_text())
    assert (after["environment"], after["measured"]) == (before["environment"], before["measured"])
    assert after["predicted"] == [asdict(row)]
    assert "| 1 | 2.00 | 100 | ok |" in (tmp_path / "scaling.md").read_text()
