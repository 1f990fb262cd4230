"""The benchmark of a PRIME step: complete on a CPU, the same work in every step, and predicted for what it runs."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import Qwen2Config

from benchmarks import prime_step, report
from benchmarks.coin import toss
from benchmarks.prime_step import DRY, SHAPES, Finished, UntilView, Workload, make_tokenizer
from benchmarks.records import NO_CLAIMS, Report
from benchmarks.step_figures import Figure, figures_table
from prime_kernels.devices import DEVICES
from prime_train.config.keys import Config
from prime_train.plan.durations import Lengths
from prime_train.plan.make import make_plan
from prime_train.plan.rates import rates_of
from prime_train.plan.records import GIB, Cluster, Plan
from prime_train.plan.sizes import sizes_of
from tests.support.paths import ROOT

STAGES = ("rollout", "score", "prm", "policy")


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("step")
    command = [sys.executable, "-m", "benchmarks.prime_step", "--out", str(out), "--dry"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "prime_step.md").read_text() in done.stdout
    return out


def test_every_stage_is_predicted_and_measured(dry):
    figures = [Figure(**entry) for entry in json.loads((dry / "prime_step.json").read_text())["figures"]]
    found = {(figure.stage, figure.unit) for figure in figures}
    whole = {("step", unit) for unit in ("s", "tokens/s", "MFU", "GiB")}
    trained = {(stage, "MFU") for stage in STAGES if stage != "rollout"}
    assert found == whole | trained | {(stage, unit) for stage in STAGES for unit in ("s", "GiB")}
    assert all(figure.predicted > 0 and figure.measured > 0 for figure in figures)


def test_a_run_on_a_cpu_claims_nothing_and_shows_the_table(dry):
    shown = (dry / "prime_step.md").read_text()
    content = json.loads((dry / "prime_step.json").read_text())
    assert NO_CLAIMS in shown
    assert figures_table([Figure(**entry) for entry in content["figures"]]) in shown
    assert "| rollout | s |" in report.text(Report(kind="dry", environment={}, stages=content))


def test_no_response_ends_before_its_limit_and_updates_are_applied(dry):
    steps = json.loads((dry / "prime_step.json").read_text())["metrics"]
    assert len(steps) == DRY.steps
    for step in steps:
        assert step["response/length"] == DRY.max_tokens
        assert step["filter/kept"] == DRY.prompts
        assert step["skipped/policy"] == step["skipped/prm"] == 0
        assert step["prm/grad_norm"] > 0


def test_half_of_random_texts_are_right_and_every_token_has_a_text_of_its_own():
    tokenizer = make_tokenizer(512)
    texts = [tokenizer.decode([token]) for token in range(512)]
    assert len(set(texts)) == 512
    assert sum(toss("17+5", text) for text in texts) == pytest.approx(256, abs=60)


def on_an_h100(workload: Workload, work: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, Plan]:
    def plan_there(config: Config, lengths: Lengths) -> Plan:
        architecture = Qwen2Config(**SHAPES[workload.model])
        cluster = Cluster(processes=1, memory=79 * GIB, cuda=True)
        rates = rates_of(DEVICES["H100"], "an H100")
        architectures = {"policy": architecture, "prm": architecture, "reference": architecture}
        return make_plan(config, cluster, rates, architectures, lengths)  # type: ignore[arg-type]

    monkeypatch.setattr(prime_step, "plan_here", plan_there)
    return prime_step.planned(work, workload, "cpu")


def test_blocks_are_recomputed_where_the_plan_needs_it_alone(tmp_path, monkeypatch):
    config, plan = on_an_h100(Workload(), tmp_path, monkeypatch)
    assert plan.fits
    assert config.model.blocks == ("checkpoint",)
    assert plan.tokens == 64 * 4 * (128 + 1024)
    small, plan = on_an_h100(Workload(model="qwen2.5-0.5b", rows=4), tmp_path, monkeypatch)
    assert plan.fits
    assert small.model.blocks == ()


def test_shapes_have_the_parameters_of_their_names():
    found = {name: sizes_of(Qwen2Config(**shape)).parameters / 1e9 for name, shape in SHAPES.items() if name != "dry"}
    assert {name: round(n, 2) for name, n in found.items()} == {"qwen2.5-0.5b": 0.49, "qwen2.5-1.5b": 1.54}


def steps_shown(view: UntilView) -> int:
    shown = []
    with contextlib.suppress(Finished), view.bar("PRIME", 9) as advance:
        for step in range(9):
            shown.append(step)
            advance("")
    return len(shown)


def test_a_run_ends_after_its_steps_or_at_the_deadline_but_not_before_one_that_counts():
    assert steps_shown(UntilView(4, deadline=float("inf"))) == 4
    assert steps_shown(UntilView(4, deadline=0.0)) == 2


def test_a_prompt_has_the_tokens_that_the_plan_is_told():
    tokenizer = make_tokenizer(512)
    workload = replace(DRY, operations=3)
    message = [{"role": "user", "content": "17+5-3+4"}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert len(rendered) == workload.lengths.prompt
