"""Compile every kernel with its default settings for sm_80, sm_90 and sm_100, with no GPU, and report what came out.

    python -m benchmarks.compile_report [--json FILE] [--arch 90] [--kernel fused_stats]

Registers and spills are read from the cubin, shared memory from Triton, instructions from the PTX. The settings are
those of `prime_kernels.plan`; the shapes are the aligned ones that real models have.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

if __name__ == "__main__":
    # Interpreted kernels cannot be compiled, and the decision falls when they are imported.
    os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prime_kernels import plan
from prime_kernels.kernels import common, fused, losses, rows

ARCHITECTURES = (80, 90, 100)
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
INSTRUCTIONS = ("mma.sync", "wgmma", "tcgen05.mma", "cp.async.bulk.tensor", "setmaxnreg")

Constants = Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel with one choice of optional arguments."""

    kernel: str
    variant: str
    fn: object
    types: dict[str, str]  # argument -> Triton type; the ones left out are constants
    constants: Constants
    num_warps: int
    num_stages: int = 3
    is_gemm: bool = False


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiler made of a case."""

    kernel: str
    variant: str
    arch: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    num_stages: int
    is_gemm: bool
    instructions: dict[str, int] = field(default_factory=dict)


# Integers that are multiples of 16 at the shapes of real models.
ALIGNED = ("N", "V", "D", "first_col", "col0")
# The optional arguments of the kernels by the option that brings them.
OPTIONS: dict[str, dict[str, str]] = {
    "bias": {"bias_ptr": "*bf16"},
    "temperature": {"temperature_ptr": "*fp32"},
    "entropy": {"entropy_ptr": "*fp32", "dentropy_ptr": "*fp32"},
    "softcap": {"softcap": "fp32"},
}
VARIANTS: tuple[tuple[str, ...], ...] = (
    (), ("temperature",), ("temperature", "entropy"), ("bias",), ("softcap",), tuple(OPTIONS),
)  # fmt: skip


def cases(arch: int) -> list[Case]:
    """Every kernel in every variant, bf16, as its launcher would start it on `arch`."""
    finish = dict.fromkeys(("state_ptr", "logp_ptr", "entropy_ptr", "max_ptr", "logsum_ptr"), "*fp32")
    finish |= {"code_ptr": "*i64", "stride_k": "i32", "stride_state": "i32", "N": "i32", "K": "i32"}
    block = {"IGNORED": common.IGNORED, "INVALID": common.INVALID, "BLOCK_N": plan.FINISH_BLOCK_N}
    found = [Case("finish", "plain", rows.finish_kernel, finish, block, num_warps=4)]
    for on in VARIANTS:
        variant = " ".join(on) if len(on) < len(OPTIONS) else "all options"
        types = {name: kind for option in on for name, kind in OPTIONS[option].items()}
        none = {name: None for option in OPTIONS if option not in on for name in OPTIONS[option]}
        found += _row_cases(variant or "plain", types, none)
        found += _stats_cases(variant or "plain", types, none, arch)
        found += _dlogits_cases(variant or "plain", types, none, arch)
    return found + _loss_cases()


def _row_cases(variant: str, types: dict[str, str], none: Constants) -> list[Case]:
    shared = {"x_ptr": "*fp32", "code_ptr": "*i64", "stride_xn": "i32", "col0": "i32", "V": "i32"}
    stats = shared | {"state_ptr": "*fp32", "stride_state": "i32"}
    grads = shared | dict.fromkeys(("max_ptr", "logsum_ptr", "dlogp_ptr", "others_ptr"), "*fp32")
    grads |= {"dx_ptr": "*bf16", "stride_dn": "i32"}
    return [
        _case("row_stats", variant, rows.row_stats_kernel, stats, types, none,
              {"BLOCK_V": plan.ROW_STATS.block_v}, plan.ROW_STATS.num_warps),
        _case("row_dlogits", variant, rows.row_dlogits_kernel, grads, types, none,
              {"BLOCK_V": plan.ROW_DLOGITS.block_v}, plan.ROW_DLOGITS.num_warps),
    ]  # fmt: skip


def _loss_cases() -> list[Case]:
    """The kernels on per-token numbers, with and without their optional arguments."""
    coefficients = {"dual_clip": "fp32", "entropy_coef": "fp32", "ref_ptr": "*fp32", "importance_ptr": "*fp32"}
    coefficients |= {"entropy_ptr": "*fp32", "dentropy_ptr": "*fp32"}
    ppo = dict.fromkeys(("logp_ptr", "old_ptr", "advantage_ptr", "weight_ptr", "loss_ptr"), "*fp32")
    ppo |= {"dlogp_ptr": "*fp32", "stats_ptr": "*fp32", "N": "i32"}
    ppo |= dict.fromkeys(("clip_low", "clip_high", "kl_coef"), "fp32")
    tokens = {"prm_ptr": "*fp32", "ref_ptr": "*fp32", "bounds_ptr": "*i64", "reward_ptr": "*fp32", "beta": "fp32"}
    prm = tokens | dict.fromkeys(("logit_ptr", "loss_ptr", "dlogp_ptr"), "*fp32") | {"mean": "fp32"}
    outcome, mask, ends = {"outcome_ptr": "*fp32"}, {"mask_ptr": "*fp32"}, {"end_ptr": "*i1"}
    scale = {"x_ptr": "*bf16", "factor_ptr": "*fp32", "numel": "i32"}
    found = []
    for variant, on in (("plain", False), ("all options", True)):
        for name, fn, arguments, optional, constants in (
            ("ppo", losses.ppo_kernel, ppo, coefficients, {"BLOCK": losses.PPO_BLOCK}),
            ("prm", losses.prm_kernel, prm, outcome | mask, {"BLOCK": losses.SEQUENCE_BLOCK}),
            ("reward", losses.reward_kernel, tokens, mask | ends, {"BLOCK": losses.SEQUENCE_BLOCK, "EACH": not on}),
        ):
            types, none = (optional, {}) if on else ({}, dict.fromkeys(optional))
            found.append(_case(name, variant, fn, arguments, types, none, constants, num_warps=4))
    return [*found, Case("scale", "plain", losses.scale_kernel, scale, {"BLOCK": losses.SCALE_BLOCK}, num_warps=4)]


def _gemm(settings: plan.GemmSettings) -> tuple[dict[str, str], Constants]:
    """Arguments and constants that both GEMM kernels take."""
    n, v, d = settings.block_n, settings.block_v, settings.block_d
    arguments = {"h": f"tensordesc<bf16[{n}, {d}]>", "w": f"tensordesc<bf16[{v}, {d}]>"}
    if not settings.tma:
        arguments = {"h": "*bf16", "w": "*bf16"}
    arguments |= {"code_ptr": "*i64"} | dict.fromkeys(("stride_hn", "stride_wv", "N", "V", "D"), "i32")
    constants = {
        "BLOCK_N": n, "BLOCK_V": v, "BLOCK_D": d, "TMA": settings.tma, "UPCAST": False,
        "WARP_SPECIALIZE": settings.warp_specialize, "FLATTEN": settings.flatten, "stride_hd": 1, "stride_wd": 1,
    }  # fmt: skip
    return arguments, constants


def _stats_cases(variant: str, types: dict[str, str], none: Constants, arch: int) -> list[Case]:
    found = []
    for ragged in (False, True):
        settings = plan.stats_settings(arch, ragged=ragged, bias="bias_ptr" in types, softcap="softcap" in types)
        arguments, constants = _gemm(settings)
        arguments |= {"partial_ptr": "*fp32"}
        arguments |= dict.fromkeys(("stride_k", "stride_state", "first_col", "tiles"), "i32")
        label = f"{variant}, ragged" if ragged else variant
        found.append(
            _case("fused_stats", label, fused.fused_stats_kernel, arguments, types, none,
                  {**constants, "RAGGED": ragged}, settings.num_warps, settings.num_stages, is_gemm=True)
        )  # fmt: skip
    return found


def _dlogits_cases(variant: str, types: dict[str, str], none: Constants, arch: int) -> list[Case]:
    settings = plan.dlogits_settings(arch, entropy="dentropy_ptr" in types, softcap="softcap" in types)
    arguments, constants = _gemm(settings)
    arguments |= dict.fromkeys(("max_ptr", "logsum_ptr", "dlogp_ptr", "others_ptr"), "*fp32")
    arguments |= {"dx_ptr": "*bf16", "stride_dn": "i32", "col0": "i32"}
    return [
        _case("fused_dlogits", variant, fused.fused_dlogits_kernel, arguments, types, none,
              {**constants, "GROUP_ROWS": fused.GROUP_ROWS}, settings.num_warps, settings.num_stages, is_gemm=True)
    ]  # fmt: skip


def _case(
    kernel: str, variant: str, fn: object, arguments: dict[str, str], types: dict[str, str], none: Constants,
    constants: Constants, num_warps: int, num_stages: int = 3, is_gemm: bool = False,
) -> Case:  # fmt: skip
    names = fn.arg_names  # type: ignore[attr-defined]
    types = arguments | {name: kind for name, kind in types.items() if name in names}
    constants = {**constants, **{name: None for name in none if name in names}}
    return Case(kernel, variant, fn, types, constants, num_warps, num_stages, is_gemm)


def compile_case(case: Case, arch: int) -> Compiled:
    """Compile for `arch`; pointers and strides are taken to be multiples of 16, as those of real shapes are."""
    names = case.fn.arg_names  # type: ignore[attr-defined]
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in case.types.items()
        if kind.startswith("*") or name.startswith("stride") or name in ALIGNED
    }
    source = ASTSource(case.fn, signature=signature, constexprs=case.constants, attrs=aligned)
    built = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": case.num_warps, "num_stages": case.num_stages}
    )
    registers, spilled = _resources(built.asm["cubin"])
    ptx = built.asm["ptx"]
    return Compiled(
        kernel=case.kernel, variant=case.variant, arch=arch, registers=registers, spilled_bytes=spilled,
        shared_bytes=built.metadata.shared, num_warps=case.num_warps, num_stages=case.num_stages, is_gemm=case.is_gemm,
        instructions={name: len(re.findall(rf"^\s*(?:@\S+\s+)?{re.escape(name)}", ptx, re.M)) for name in INSTRUCTIONS},
    )  # fmt: skip


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of spilled registers (the stack frame of a kernel without local arrays)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump named no resources:\n{usage.stdout}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def report(architectures: tuple[int, ...] = ARCHITECTURES, kernel: str | None = None) -> list[Compiled]:
    return [
        compile_case(case, arch)
        for arch in architectures
        for case in cases(arch)
        if kernel is None or case.kernel == kernel
    ]


def table(results: list[Compiled]) -> str:
    head = ("kernel", "variant", "arch", "warps", "stages", "regs", "spilled B", "shared B", "instructions")
    lines: list[tuple[str, ...]] = [head]
    for r in results:
        used = ", ".join(f"{name} ×{count}" for name, count in r.instructions.items() if count) or "–"
        numbers = (r.num_warps, r.num_stages, r.registers, r.spilled_bytes, r.shared_bytes)
        lines.append((r.kernel, r.variant, f"sm_{r.arch}", *map(str, numbers), used))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--arch", type=int, action="append", help="only this compute capability, such as 90")
    parser.add_argument("--kernel", help="only this kernel")
    args = parser.parse_args()
    results = report(tuple(args.arch or ARCHITECTURES), args.kernel)
    print(f"triton {triton.__version__}")
    print(table(results))
    if args.json:
        args.json.write_text(
            json.dumps({"triton": triton.__version__, "kernels": [asdict(r) for r in results]}, indent=1) + "\n"
        )
    spilled = [r for r in results if r.spilled_bytes and r.arch >= 90]
    if spilled:
        sys.exit(f"{len(spilled)} kernels spill on sm_90 or sm_100")


if __name__ == "__main__":
    main()
