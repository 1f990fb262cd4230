"""What the compiler makes of every kernel, for GPUs that need not be there."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> list[dict]:
    """The report of a process of its own: kernels in this one may be interpreted."""
    out = tmp_path_factory.mktemp("report") / "report.json"
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_report", "--json", out],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert out.exists(), done.stderr
    return json.loads(out.read_text())["kernels"]


@pytest.mark.slow
def test_every_kernel_compiles_without_spills_and_with_the_architectures_instructions(kernels):
    from benchmarks.compile_report import MATRIX_INSTRUCTION, VARIANTS

    names = {"finish", "row_stats", "row_dlogits", "fused_stats", "fused_dlogits", "ppo", "prm", "reward", "scale"}
    assert {k["kernel"] for k in kernels} == names
    assert {k["arch"] for k in kernels} == {80, 90, 100}
    assert len(kernels) == 3 * (1 + 5 * len(VARIANTS) + 3 * 2 + 1)
    for k in kernels:
        where = f"{k['kernel']} ({k['variant']}) on sm_{k['arch']}"
        assert 0 < k["registers"] <= 255, where
        if k["arch"] >= 90:
            assert k["spilled_bytes"] == 0, where
        if k["is_gemm"]:
            assert k["instructions"][MATRIX_INSTRUCTION[k["arch"]]] > 0, where
            assert (k["instructions"]["cp.async.bulk.tensor"] > 0) == (k["arch"] >= 90), where
        else:
            assert sum(k["instructions"].values()) == 0, where


def test_every_kernel_of_the_package_is_in_the_report():
    from benchmarks.compile_report import cases

    kernels = {f.stem: f.read_text() for f in (ROOT / "prime_kernels" / "kernels").glob("*.py")}
    defined = {
        line.removeprefix("def ").split("(")[0].removesuffix("_kernel")
        for text in kernels.values()
        for line in text.splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert {case.kernel for case in cases(90)} == defined
