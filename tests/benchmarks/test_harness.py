"""The benchmarks: declarations hang together, wrong answers get no time, and the commands run as a user runs them."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import cases, plots, report, sections, tiles
from benchmarks.harness import Bench, Effort, Row, call, peak_memory, poisoned
from benchmarks.inputs import make_inputs, make_weight
from benchmarks.providers import Provider, Unavailable, providers_of
from benchmarks.providers.wheels import load_file
from benchmarks.records import NO_CLAIMS, Report, Section, merged
from benchmarks.roofline import Ceilings, floors, gemm_key
from prime_kernels import plan
from tests.support.paths import ROOT

CPU = torch.device("cpu")
QUICK = Effort(0, 2, 2)
SMALL = cases.Case("ppo", 32, 16, 128, "float32")


def run(*args: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *args], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def provider(build, name="subject") -> Provider:
    return Provider(name=name, what="", ops=cases.ALL_OPS, build=build)


# ---- what is declared


def test_every_case_has_an_op_whose_gate_exists():
    declared = (*cases.GPU_MAIN, *cases.GPU_HEADS, *cases.GPU_TOKENS, *cases.CPU_MAIN, *cases.CPU_TOKENS)
    for case in declared:
        assert (ROOT / case.spec.gate).exists()
    assert set(cases.ALL_OPS) == set(cases.OPS)


def test_floors_count_the_products_and_the_least_bytes():
    case = cases.Case("ppo", 8192, 4096, 131072)
    assert case.flops == 6 * 8192 * 4096 * 131072
    assert replace(case, op="logprob").flops == 8 * 8192 * 4096 * 131072
    assert case.bytes == 2 * (2 * 8192 * 4096 + 2 * 131072 * 4096)
    rates = Ceilings(1e12, {gemm_key(case, gemm): 100e12 for gemm in ("logits", "dhidden", "dweight")})
    found = floors(case, rates)
    assert found is not None
    assert found.compute_ms == pytest.approx(case.flops / 100e12 * 1e3)
    assert floors(replace(case, V=1000), rates) is None


def test_every_op_has_ours_eager_and_a_compiled_provider():
    for op in cases.OPS:
        names = {p.name for p in providers_of(replace(SMALL, op=op))}
        assert {"ours-chunked", "ours-fused", "ours-torch", "eager", "compile"} <= names


# ---- what the harness does


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize(
    "name", ["ours-torch", pytest.param("ours-chunked", marks=pytest.mark.slow), "eager", "chunked-eager"]
)
def test_ours_and_plain_torch_agree_with_the_oracle(op, name):
    case = replace(SMALL, op=op)
    chosen = providers_of(case, (name,))
    if not chosen:
        pytest.skip(f"{name} has no {op}")
    row = Bench(case, CPU).measure(chosen[0], QUICK)
    assert row.status == "ok", row.reason
    assert row.ms is not None
    assert row.ms > 0
    assert row.peak_bytes is not None
    assert row.error is not None
    assert row.error < 1e-5
    assert row.of_bare is not None
    assert row.of_bare > 0


def test_targets_have_probabilities_from_small_to_nearly_one():
    case = cases.Case("forward", 512, 64, 4096, "float32")
    x = make_inputs(case, make_weight(case, CPU), seed=0)
    logits = x.hidden @ x.weight.T
    logp = torch.log_softmax(logits, 1).gather(1, x.targets[:, None]).squeeze(1)
    assert logp.min() < -3
    assert logp.max() > -0.01
    # The behaviour policy stands where it was meant to: no ratio at the edge of the clip range.
    ratio = (logp - x.old_logp).exp()
    assert ((ratio - 0.8).abs() > 0.02).all()
    assert ((ratio - 1.2).abs() > 0.02).all()


def test_a_wrong_answer_gets_no_time():
    row = Bench(SMALL, CPU).measure(provider(lambda case, device: lambda x: (x.hidden.sum() + x.weight.sum(),)), QUICK)
    assert (row.status, row.ms) == ("wrong", None)
    assert "is off by" in row.reason


def test_an_output_that_nobody_wrote_gets_no_time():
    case = replace(SMALL, op="forward")

    def forgets_the_last_token(x):
        out = torch.empty(x.N)
        out[:-1] = torch.log_softmax(x.hidden @ x.weight.T, 1).gather(1, x.targets[:, None]).squeeze(1)[:-1]
        return (out,)

    row = Bench(case, CPU).measure(provider(lambda case, device: forgets_the_last_token), QUICK)
    assert (row.status, row.ms) == ("wrong", None)


@pytest.mark.gpu
def test_on_a_gpu_right_answers_are_timed_and_unwritten_ones_are_not():
    case = cases.Case("forward", 512, 256, 4096)
    bench = Bench(case, torch.device("cuda"))
    for right in providers_of(case, ("ours-chunked", "ours-fused", "eager")):
        row = bench.measure(right, QUICK)
        assert row.status == "ok", row.reason
        assert row.ms is not None
        assert row.peak_bytes is not None
        assert row.peak_bytes > 0

    def forgets_the_last_token(x):
        logits = x.hidden.float() @ x.weight.float().T
        out = torch.empty(x.N, device=x.hidden.device)
        out[:-1] = torch.log_softmax(logits, 1).gather(1, x.targets[:, None]).squeeze(1)[:-1]
        return (out,)

    assert bench.measure(provider(lambda case, device: forgets_the_last_token), QUICK).status == "wrong"


def test_poison_is_gone_afterwards():
    with poisoned(CPU):
        assert torch.empty(100).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_failures_lack_of_memory_and_absence_become_rows():
    bench = Bench(SMALL, CPU)

    def raising(error):
        def build(case, device):
            raise error

        return provider(build)

    assert bench.measure(raising(Unavailable("no such wheel")), QUICK).status == "skipped"
    assert bench.measure(raising(torch.OutOfMemoryError("60 GiB")), QUICK).status == "out of memory"
    row = bench.measure(raising(AssertionError("hidden must be\nfour-legged")), QUICK)
    assert (row.status, row.reason) == ("failed", "AssertionError: hidden must be")


def test_peak_memory_counts_what_is_held_at_once():
    def peaks():
        first = torch.ones(1 << 20)
        second = first + 1
        del first
        return second.sum()

    found = peak_memory(peaks, CPU)
    assert 8 << 20 <= found.peak < 9 << 20
    assert found.scratch >= 8 << 20


def test_a_peer_that_is_not_unpacked_is_unavailable_and_says_how_to_get_it():
    with pytest.raises(Unavailable, match="nosuchpeer is not installed"):
        load_file("nosuchpeer.kernels.fast")


def test_tile_candidates_start_with_the_settings_in_force_and_leave_the_tables_alone():
    before = dict(plan.FUSED)
    for arch in (0, 80, 90, 100):
        found = tiles.candidates(arch)
        assert found[0] == plan.dlogits_settings(arch, entropy=False, softcap=False)
        assert len(found) == len(set(found)) > 1
    candidate = tiles.candidates(90)[1]
    with tiles.in_place(90, candidate):
        assert plan.exponentials_settings(90, bias=False, softcap=False) == candidate
        assert plan.exponentials_settings(90, bias=False, softcap=True) == before[90][2]
    assert before == plan.FUSED
    assert eval(tiles.literal(candidate), vars(plan)) == candidate


# ---- what the report says


def example(kind: str) -> Report:
    case = cases.GPU_MAIN[0]
    gemms = {gemm_key(case, gemm): 700e12 for gemm in case.spec.gemms}
    row = Row(case=case, provider="ours-chunked", status="ok", ms=50.0, spread=0.01, runs=9, peak_bytes=3 << 30,
              scratch_bytes=1 << 30, errors={"loss": 1e-6, "dhidden": 2e-3})  # fmt: skip
    skipped = Row(case=case, provider="trl", status="skipped", reason="trl is not installed (`make peers`)")
    environment = {"hardware": "Some GPU", "date": "2026-01-01", "torch": "2", "triton": "3", "commit": "abc"}
    return Report(
        kind=kind, environment=environment, ceilings=Ceilings(3e12, gemms), rows=[row, skipped],
        memory=[row, replace(row, case=replace(case, V=1000))], sections=[Section(name="main", status="ok", seconds=1)],
    )  # fmt: skip


def test_a_report_survives_its_json_and_says_why_a_peer_is_missing(tmp_path):
    written = example("gpu")
    report.write(written, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "speed.png", "error.png", "memory.png"}
    assert Report.load(tmp_path / "results.json") == written
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["rows"][0]["floor_ms"] == pytest.approx(floors(cases.GPU_MAIN[0], written.ceilings).ms)
    printed = report.text(written)
    assert "trl is not installed (`make peers`)" in printed
    assert "ours-chunked" in printed
    assert report.roofline_table(written).count("\n") == 1


def test_numbers_of_the_pages_come_from_gpu_runs_alone(tmp_path):
    assert report.numbers_block(tmp_path) == report.speed_block(tmp_path, tmp_path) == report.NO_GPU_RUN
    report.write(example("cpu"), tmp_path / "a-cpu")
    assert report.numbers_block(tmp_path) == report.speed_block(tmp_path, tmp_path) == report.NO_GPU_RUN
    report.write(example("gpu"), tmp_path / "some-gpu")
    assert "| ppo | ours-chunked | 50.0 |" in report.numbers_block(tmp_path)


def test_speed_is_a_picture_and_a_line_with_our_fastest_and_the_fastest_other(tmp_path):
    run = example("gpu")
    ours = run.rows[0]
    others = [replace(ours, provider=name, ms=ms) for name, ms in (("ours-fused", 40.0), ("trl", 90.0), ("cce", 70.0))]
    results = tmp_path / "results"
    report.write(replace(run, rows=[ours, *others]), results / "some-gpu")
    old = replace(run, environment={**run.environment, "date": "2025-01-01"}, rows=[replace(ours, ms=1.0)])
    report.write(old, results / "z-older")
    shown, empty, line = report.speed_block(results, tmp_path / "docs").split("\n")
    assert shown == "![time of each op by everybody, beside its bare GEMMs](../results/some-gpu/speed.png)"
    assert not empty
    assert "Some GPU, 2026-01-01: ours-fused 40.0 ms and 3.00 GiB, cce 70.0 ms and 3.00 GiB." in line


def test_a_run_is_kept_by_hardware_and_date_and_a_dry_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    report.write(example("gpu"), tmp_path / "run")
    kept = report.keep(tmp_path / "run")
    assert kept == tmp_path / "results" / "some-gpu-2026-01-01"
    assert (kept / "results.json").exists()
    report.write(example("dry"), tmp_path / "dry")
    with pytest.raises(ValueError, match="dry run"):
        report.keep(tmp_path / "dry")


def test_no_plot_is_drawn_of_nothing(tmp_path):
    plots.draw(Report(kind="cpu", environment={}), tmp_path)
    assert not list(tmp_path.iterdir())


# ---- the commands


@pytest.mark.slow
def test_cpu_command_puts_ours_torch_and_a_peer_in_one_table(tmp_path):
    names = ("ours-torch", "ours-chunked", "eager", "liger-scaled", "cce")
    flags = [flag for name in names for flag in ("--provider", name)]
    printed = run("benchmarks.cpu", "--op", "forward", *flags, "--out", str(tmp_path), TRITON_INTERPRET="0")
    assert NO_CLAIMS in printed
    rows = Report.load(tmp_path / "results.json").rows
    status = {row.provider: row.status for row in rows}
    assert status["ours-torch"] == status["eager"] == "ok"
    assert status["ours-chunked"] == "skipped"
    assert "needs an NVIDIA GPU" in printed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gpu_command_enters_every_section_and_survives_a_crash(tmp_path):
    printed = run("benchmarks.gpu", "--dry", "--minutes", "12", "--out", str(tmp_path), "--fault", "tokens=crash")
    found = Report.load(tmp_path / "results.json")
    status = {section.name: section.status for section in found.sections}
    assert status.pop("tokens") == "crashed with SIGABRT"
    assert status == dict.fromkeys(("ceilings", "tests", "main", "heads", "memory", "settings", "step"), "ok"), printed
    measured = {(row.provider, row.case.op) for row in found.rows if row.status == "ok"}
    assert {("ours-chunked", "ppo"), ("ours-fused", "ppo"), ("eager", "ppo")} <= measured
    assert found.ceilings is not None
    assert found.memory
    assert all(s["forward"] <= s["bound"] for s in found.scratch)
    assert any("FUSED[0][0]: GemmSettings(" in line for line in found.best)
    assert found.stages
    files = list(tmp_path.iterdir())
    assert {"results.json", "log.txt", "speed.png", "error.png", "memory.png"} <= {f.name for f in files}
    assert len(files) <= 8


@pytest.mark.slow
def test_gpu_command_stops_a_section_that_hangs(tmp_path):
    sections = ("--section", "ceilings", "--section", "memory", "--fault", "ceilings=hang")
    run("benchmarks.gpu", "--dry", "--minutes", "0.6", "--out", str(tmp_path), *sections)
    hung, after = Report.load(tmp_path / "results.json").sections
    assert hung.status == "stopped at its limit of 13 s"
    assert after.status != "not reached, time is up"


def test_call_returns_results_and_gradients_by_name():
    (eager,) = providers_of(SMALL, ("eager",))
    bench = Bench(SMALL, CPU)
    got = call(eager.build(SMALL, CPU), SMALL, bench.batches[0])
    assert list(got) == ["loss", "dhidden", "dweight"]
    assert got["dweight"].shape == (SMALL.V, SMALL.D)


@pytest.mark.slow
def test_micro_benchmarks_run_under_pytest():
    pytest.importorskip("pytest_benchmark")
    flags = ("--benchmark-disable", "-p", "no:cacheprovider", "-p", "no:xdist")
    assert "failed" not in run("pytest", "benchmarks", *flags, TRITON_INTERPRET="0")


def test_a_section_goes_on_after_the_row_that_killed_it(tmp_path):
    out = tmp_path / "tokens.jsonl"
    case = cases.DRY_TOKENS[0]
    begin = {"kind": "row", "case": asdict(case), "provider": "ours-torch"}
    out.write_text(json.dumps({"kind": "begin", "content": begin}) + '\n{"kind": "row", "con')
    sections.run_section("tokens", dry=True, seconds=60, out=out)
    found, summary = merged(Report(kind="dry", environment={}), sections.findings(out), "ok")
    rows = {(row.case, row.provider): row for row in found.rows}
    assert summary == "all cases"
    assert rows[case, "eager"].status == "ok"
    assert rows[case, "ours-torch"].status == "failed"
    assert rows[case, "ours-torch"].reason.startswith("its process ended here")
