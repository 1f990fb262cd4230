"""What the compiler makes of every kernel, for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks import sass
from tests.support.paths import ROOT

WITH_LOOP = ("row_stats", "row_dlogits")
TEXT = """
        .text.kernel:
        /*0000*/                   LDG.E.64 R2, desc[UR14][R2.64] ;
        /*0010*/                   BRA.U !UP2, `(.L_x_3) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR14][R4.64] ;
                                                                      /* 0x000000ff7d7e7c12 */
        /*0030*/              @!P0 LDG.E.LTC128B.64 R8, desc[UR14][R8.64+0x10] ;
        /*0040*/                   FADD R4, R4, R8 ;
        /*0050*/              @!P2 BRA `(.L_x_4) ;
.L_x_2:
        /*0060*/                   FMUL R4, R4, R4 ;
        /*0070*/               @P1 BRA `(.L_x_2) ;
        /*0080*/                   STG.E.U16 desc[UR14][R6.64], R4 ;
        /*0090*/                   NOP ;
        /*00a0*/              @!P0 BRA `(.L_x_1) ;
.L_x_3:
        /*00b0*/              @!P0 LDG.E R9, desc[UR14][R2.64] ;
        /*00c0*/              @!P0 STG.E desc[UR14][R6.64], R4 ;
        /*00d0*/                   EXIT ;
.L_x_4:
        /*00e0*/                   MUFU.RCP R5, R4 ;
        /*00f0*/                   BRA `(.L_x_2) ;
.L_x_5:
        /*0100*/                   BRA `(.L_x_5);
.L_x_6:
"""


def test_the_main_loop_is_the_one_that_moves_most_memory():
    loop = sass.main_loop(TEXT)
    assert loop is not None
    assert (loop.loads, loop.stores) == ((128, 64), (16,))
    assert (loop.outer_loads, loop.outer_stores) == ((64, 32), (32,))
    assert sass.accesses(TEXT, "LDG") == (64, 128, 64, 32)
    assert sass.accesses(TEXT, "STG") == (16, 32)


def test_a_loop_has_the_code_that_was_moved_out_of_it_and_no_other():
    # Eight between the loop's first and last but the one that does nothing, and two behind the kernel's end.
    loop = sass.main_loop(TEXT)
    assert loop is not None
    assert loop.instructions == 8 + 2


def test_without_a_loop_over_memory_there_is_none():
    assert sass.main_loop(TEXT.replace("LDG", "LDS").replace("STG", "STS")) is None
    assert sass.main_loop(TEXT.replace("@!P0 BRA", "@!P0 NOP")) is None
    assert sass.main_loop("") is None


def test_a_branch_back_to_where_another_way_leads_closes_no_loop():
    assert sass.main_loop(TEXT.replace("`(.L_x_3)", "`(.L_x_2)")) is None


@pytest.mark.parametrize(
    ("operation", "width"),
    [("LDG.E", 32), ("LDG.E.U8", 8), ("LDG.E.S16.CONSTANT", 16), ("LDG.E.LTC128B", 32), ("STG.E.64", 64),
     ("LDG.E.LTC128B.128.CONSTANT", 128), ("LDG.E.ENL2.256", 256)],
)  # fmt: skip
def test_the_width_of_an_access_is_in_its_name(operation, width):
    assert sass.bits(operation) == width


def test_the_narrowest_access_is_looked_for_among_those_that_are_needed():
    assert sass.narrowest([32, 128, 16, 64], 128) == 128
    assert sass.narrowest([32, 128, 16, 64], 160) == 64
    assert sass.narrowest([32, 16], 64) is None


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
    from benchmarks.compile_cases import cases
    from benchmarks.compile_report import ARCHITECTURES, MATRIX_INSTRUCTION

    names = {"finish", "row_stats", "row_dlogits", "fused_dlogits", "ppo", "prm", "reward", "scale", "scale_rows"}
    names |= {"offsets", "exponentials", "merge_tiles", "settle"}
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
def test_fused_kernels_on_sm_120_multiply_with_mma_sync_and_copy_without_tma(kernels):
    fused = [k for k in kernels if k["is_gemm"] and k["arch"] == 120]
    assert {k["kernel"] for k in fused} == {"exponentials", "fused_dlogits"}
    for k in fused:
        used = {name for name, count in k["instructions"].items() if count}
        assert used == {"mma.sync", "cp.async.cg"}, where(k)


@pytest.mark.slow
def test_every_variant_fits_the_shared_memory_of_every_gpu_that_runs_it(kernels):
    from benchmarks.compile_report import SAME_SETTINGS, SHARED_LIMIT

    assert SAME_SETTINGS[80] == (86, 89)
    for k in kernels:
        for arch in (k["arch"], *SAME_SETTINGS.get(k["arch"], ())):
            assert k["shared_bytes"] <= SHARED_LIMIT[arch], f"{where(k)}, run on sm_{arch}"


@pytest.mark.slow
def test_logits_are_read_and_gradients_written_128_bits_at_a_time_wherever_the_vocabulary_ends(kernels):
    rows = [k for k in kernels if k["kernel"] in ("row_stats", "row_dlogits")]
    assert {(k["kernel"], k["ragged"]) for k in rows} == {(n, r) for n in WITH_LOOP for r in (False, True)}
    for k in rows:
        assert k["load_bits"] == 128, where(k)
        assert k["rest_load_bits"] == 128, where(k)
    for k in kernels:
        if k["kernel"].endswith("dlogits"):
            assert k["store_bits"] == 128, where(k)
        if k["kernel"] == "row_dlogits":
            assert k["rest_store_bits"] == 128, where(k)


@pytest.mark.slow
def test_a_logit_takes_fewer_instructions_without_the_entropy_and_no_more_in_a_ragged_vocabulary(kernels):
    found = {(k["kernel"], k["variant"], k["arch"]): k["per_logit"] for k in kernels}
    for arch in sorted({k["arch"] for k in kernels}):
        for kernel in WITH_LOOP:
            plain = found[kernel, "plain", arch]
            assert plain <= found[kernel, "entropy", arch] - 2, f"{kernel} on sm_{arch}"
            assert found[kernel, "plain, V % 16", arch] <= plain + 0.5, f"{kernel} on sm_{arch}"
    for k in kernels:
        assert (k["per_logit"] is not None) == (k["kernel"] in WITH_LOOP), where(k)


def test_every_choice_that_selects_other_code_is_in_the_report():
    from benchmarks.compile_cases import VARIANTS, cases, name_of

    for arch in (80, 90, 100, 120):
        names = [(case.kernel, case.variant) for case in cases(arch)]
        assert len(names) == len(set(names))
        for kernel in (*WITH_LOOP, "exponentials", "fused_dlogits"):
            variants = {variant for name, variant in names if name == kernel}
            assert {name_of(options) for options in VARIANTS} <= variants
            assert {"plain, V % 16", "all options, V % 16", "all options, fp16"} <= variants
        of = {kernel: [case for case in cases(arch) if case.kernel == kernel] for kernel, _ in names}
        for kernel in ("row_stats", "exponentials"):
            assert {case.constants["ENTROPY"] for case in of[kernel]} == {False, True}
        assert {"entropy_ptr" in case.types for case in of["finish"]} == {False, True}
        assert {case.types["dx_ptr"] for case in of["row_dlogits"]} == {"*bf16", "*fp16", "*fp32"}
        for kernel in WITH_LOOP:
            assert {case.types.get("bias_ptr") for case in of[kernel]} == {None, "*bf16", "*fp16", "*fp32"}
        scaled = {(case.types["out_ptr"], case.constants["IN_PLACE"]) for case in of["scale"]}
        assert scaled == {("*fp32", True), ("*bf16", False), ("*fp16", False)}
        for kernel in ("prm", "reward"):
            assert {case.types["bounds_ptr"] for case in of[kernel]} == {"*i32", "*i64"}


def test_what_is_wrong_with_a_kernel_is_named():
    from benchmarks.compile_report import Compiled, faults

    good = Compiled(
        "row_dlogits", "plain", 90, registers=40, spilled_bytes=0, shared_bytes=0, num_warps=4, num_stages=3,
        is_gemm=False, load_bits=128, store_bits=128, rest_load_bits=128, rest_store_bits=128, per_logit=11.0,
    )  # fmt: skip
    assert faults(good) == []
    bad = replace(
        good, arch=120, spilled_bytes=8, shared_bytes=1 << 17, load_bits=32, store_bits=16, rest_load_bits=None,
        rest_store_bits=16, per_logit=99.0, serial=True,
    )  # fmt: skip
    assert [line.removeprefix("row_dlogits (plain) on sm_120 ") for line in faults(bad)] == [
        "spills 8 bytes",
        "takes 131072 bytes of shared memory, 101376 are there",
        "waits for each of its products before the next one",
        "takes 99.0 instructions a logit, 12.0 at the most",
        "has a load of 32 bits, 128 at the least",
        "has no load of the rest that could be told from others",
        "has a store of 16 bits, 128 at the least",
        "has a store of the rest of 16 bits, 128 at the least",
    ]


def test_products_that_wait_for_each_other_are_told_from_those_that_run_on():
    product = "        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24{} ;\n"
    wait = "        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
    assert not sass.serial(3 * product.format("") + product.format(", gsb0") + wait)
    assert sass.serial(4 * (product.format(", gsb0") + wait))
    assert not sass.serial(TEXT)


def test_settings_of_sm_80_must_fit_the_shared_memory_of_sm_86():
    from benchmarks.compile_report import Compiled, faults

    large = Compiled("exponentials", "plain", 80, 255, 0, 100 << 10, 8, 4, True)
    assert len(faults(large)) == 1
    assert faults(replace(large, shared_bytes=99 << 10)) == []


def test_every_kernel_of_the_package_is_in_the_report():
    from benchmarks.compile_cases import cases

    kernels = {f.stem: f.read_text() for f in (ROOT / "prime_kernels" / "kernels").glob("*.py")}
    defined = {
        line.removeprefix("def ").split("(")[0].removesuffix("_kernel")
        for text in kernels.values()
        for line in text.splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert {case.kernel for case in cases(90)} == defined
