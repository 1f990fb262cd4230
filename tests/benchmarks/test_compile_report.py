"""What the compiler makes of every kernel, for GPUs that need not be there."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import sass
from tests.support.paths import ROOT

TEXT = """
        /*0000*/                   LDG.E.64 R2, desc[UR14][R2.64] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR14][R4.64] ;
        /*0020*/              @!P0 LDG.E.128 R8, desc[UR14][R8.64+0x10] ;
        /*0030*/                   FADD R4, R4, R8 ;
.L_x_2:
        /*0040*/                   FMUL R4, R4, R4 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   STG.E.U16 desc[UR14][R6.64], R4 ;
        /*0070*/                   NOP ;
        /*0080*/              @!P0 BRA `(.L_x_1) ;
        /*0090*/              @!P0 STG.E desc[UR14][R6.64], R4 ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
"""


def test_the_main_loop_is_the_one_that_moves_memory():
    loop = sass.main_loop(TEXT)
    assert loop is not None
    assert loop.loads == (128, 128)
    assert loop.stores == (16,)
    assert loop.instructions == 7  # without what does nothing
    assert sass.accesses(TEXT, "LDG") == (64, 128, 128)
    assert sass.accesses(TEXT, "STG") == (16, 32)


def test_without_a_loop_over_memory_there_is_none():
    assert sass.main_loop(TEXT.replace("LDG", "LDS").replace("STG", "STS")) is None
    assert sass.main_loop("") is None


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
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["kernels"]


def where(k: dict) -> str:
    return f"{k['kernel']} ({k['variant']}) on sm_{k['arch']}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_compiles_without_spills_and_with_the_architectures_instructions(kernels):
    from benchmarks.compile_report import ARCHITECTURES, MATRIX_INSTRUCTION, cases

    names = {"finish", "row_stats", "row_dlogits", "fused_stats", "fused_dlogits", "ppo", "prm", "reward", "scale"}
    assert {k["kernel"] for k in kernels} == names
    assert {k["arch"] for k in kernels} == set(ARCHITECTURES) == {80, 90, 100, 120}
    assert len(kernels) == sum(len(cases(arch)) for arch in ARCHITECTURES)
    for k in kernels:
        assert 0 < k["registers"] <= 255, where(k)
        if k["arch"] >= 90:
            assert k["spilled_bytes"] == 0, where(k)
        if k["is_gemm"]:
            assert k["instructions"][MATRIX_INSTRUCTION[k["arch"]]] > 0, where(k)
            assert (k["instructions"]["cp.async.bulk.tensor"] > 0) == (k["arch"] in (90, 100)), where(k)
        else:
            assert sum(k["instructions"].values()) == 0, where(k)


@pytest.mark.slow
def test_every_variant_fits_the_shared_memory_of_its_architecture(kernels):
    from benchmarks.compile_report import SHARED_LIMIT

    for k in kernels:
        assert k["shared_bytes"] <= SHARED_LIMIT[k["arch"]], where(k)
    # What serves sm_80 serves sm_86, sm_89 and sm_120 as well.
    assert SHARED_LIMIT[80] == SHARED_LIMIT[120] == 99 * 1024


@pytest.mark.slow
def test_logits_are_read_and_gradients_written_128_bits_at_a_time_wherever_the_vocabulary_ends(kernels):
    of_rows = [k for k in kernels if k["kernel"] in ("row_stats", "row_dlogits")]
    assert {k["ragged"] for k in of_rows} == {False, True}
    for k in of_rows:
        if "bias" not in k["variant"] and "all" not in k["variant"]:
            assert k["load_bits"] == 128, where(k)
        # Four of a whole block, one of a smaller block of the masked rest.
        assert k["wide_loads"] >= 5, where(k)
    for k in kernels:
        if k["kernel"] in ("row_dlogits", "fused_dlogits"):
            assert k["store_bits"] == 128, where(k)


@pytest.mark.slow
def test_a_logit_takes_fewer_instructions_without_the_entropy_and_no_more_in_a_ragged_vocabulary(kernels):
    found = {(k["kernel"], k["variant"], k["arch"]): k["per_logit"] for k in kernels}
    for arch in (80, 90, 100, 120):
        plain = found["row_stats", "plain", arch]
        assert plain <= found["row_stats", "entropy", arch] - 2
        assert found["row_stats", "plain, V % 16", arch] <= plain + 0.5
        assert found["row_dlogits", "plain, V % 16", arch] <= found["row_dlogits", "plain", arch] + 0.5


def test_what_is_wrong_with_a_kernel_is_named():
    from benchmarks.compile_report import Compiled, faults

    good = Compiled("row_dlogits", "plain", 90, 40, 0, 0, 4, 3, False, load_bits=128, store_bits=128, per_logit=15.0)
    assert faults(good) == []
    bad = Compiled(
        "row_dlogits", "plain", 120, 255, 8, 1 << 17, 4, 3, False, load_bits=32, store_bits=16, per_logit=99.0
    )
    assert [line.removeprefix("row_dlogits (plain) on sm_120 ") for line in faults(bad)] == [
        "spills 8 bytes",
        "takes 131072 bytes of shared memory, 101376 are there",
        "loads 32 bits at a time",
        "stores 16 bits at a time",
        "takes 99.0 instructions a logit, 16.5 at the most",
    ]


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
