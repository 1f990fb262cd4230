"""Compile every kernel with its default settings for sm_80, sm_90, sm_100 and sm_120, without a GPU, and report.

    python -m benchmarks.compile_report [--json FILE] [--arch 90] [--kernel fused_stats]

Registers, spills, widths of loads and stores and instructions a logit are read from the cubin, shared memory from
Triton, matrix instructions from the PTX. The settings are those of `prime_kernels.plan`. Exit status 1, and a line for
each, where a figure is not what it should be (`faults`).

Widths and instructions a logit are those of a row kernel's loop over whole blocks of logits, and "rest" is the last
block, which has a mask. An instruction counts once, however seldom it is reached. A fused kernel's loop runs over the
hidden size, and its epilogue cannot be told from it; only the width of `fused_dlogits`' stores is known, as it stores
nothing but gradients. Elsewhere these figures are left out, as they are where a row kernel's loop does not read whole
blocks of logits, so that it is not the one looked for.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Interpreted kernels cannot be compiled, and the decision falls when they are imported.
    os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import sass
from prime_kernels import constants, plan
from prime_kernels.kernels import common, exponentials, fused, losses, rows

ARCHITECTURES = (80, 90, 100, 120)
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
# Bytes of shared memory that a program may take, and what else runs with an architecture's settings.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
SAME_SETTINGS = {80: (86, 89)}
WIDE = 128  # bits at the least of an access to logits and to their gradients
# Instructions a logit at the most: a little above what the compilers of Triton 3.6 to 3.9 make of it for any
# architecture, dtype and end of the vocabulary. By kernel, then by `VARIANTS`.
PER_LOGIT: dict[str, dict[str, float]] = {
    "row_stats": {
        "plain": 18.0, "entropy": 22.0, "temperature": 19.0, "temperature entropy": 23.0, "bias": 21.0,
        "softcap": 58.5, "all options": 67.0,
    },
    "row_dlogits": {
        "plain": 17.0, "entropy": 22.0, "temperature": 18.0, "temperature entropy": 23.0, "bias": 19.5,
        "softcap": 62.5, "all options": 73.5,
    },
}  # fmt: skip
LOSSES = ("ppo", "prm", "reward", "scale")
STORES_TILES = ("fused_dlogits", "exponentials")
INSTRUCTIONS = ("mma.sync", "wgmma", "tcgen05.mma", "cp.async.cg", "cp.async.bulk.tensor", "setmaxnreg")

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
    ragged: bool = False  # V is no multiple of 16
    logits: int | None = None  # that a thread handles in one block
    logit_bits: int = 32  # that are read for each: itself and its bias


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
    ragged: bool = False
    load_bits: int | None = None  # the narrowest load of the main loop,
    store_bits: int | None = None  # and its narrowest store
    rest_load_bits: int | None = None  # the narrowest load of logits behind the main loop,
    rest_store_bits: int | None = None  # and the narrowest store of gradients
    per_logit: float | None = None  # instructions of the main loop


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
    (), ("entropy",), ("temperature",), ("temperature", "entropy"), ("bias",), ("softcap",), tuple(OPTIONS),
)  # fmt: skip
DTYPES = ("fp32", "fp16")  # of weights, gradients and bias, beside bf16
BITS = {"*fp32": 32, "*bf16": 16, "*fp16": 16}


def cases(arch: int) -> list[Case]:
    """Every kernel in every variant that selects other code, as its launcher would start it on `arch`."""
    found = _finish_cases()
    for on in VARIANTS:
        variant = name_of(on)
        types = {name: kind for option in on for name, kind in OPTIONS[option].items()}
        none = {name: None for option in OPTIONS if option not in on for name in OPTIONS[option]}
        found += _row_cases(variant, types, none)
        found += [_stats_case(variant, types, none, arch)]
        found += [_stats_case(f"{variant}, rest", types, none, arch, rest=True)]
        found += [_dlogits_case(variant, types, none, arch)]
        if "softcap" not in on:
            found += [_exponentials_case(variant, types, none, arch)]
            found += [_exponentials_case(f"{variant}, rest", types, none, arch, rest=True)]
        if on and len(on) < len(OPTIONS):
            continue
        # The rest is tried with no option and with all.
        ragged = f"{variant}, V % 16"
        found += _row_cases(ragged, types, none, ragged=True)
        found += [_stats_case(ragged, types, none, arch, ragged=True)]
        found += [_stats_case(f"{variant}, one tile", types, none, arch, rest=True, tiles=1)]
        found += [_dlogits_case(ragged, types, none, arch, ragged=True)]
        for dtype in DTYPES:
            of_dtype = {name: kind.replace("bf16", dtype) for name, kind in types.items()}
            label = f"{variant}, {dtype}"
            rows = _row_cases(label, of_dtype, none, dtype)
            found += rows if on else rows[1:]  # without a bias, no statistics know of the dtype
            if dtype == "fp16":
                found += [_stats_case(label, of_dtype, none, arch, dtype=dtype)]
                found += [_dlogits_case(label, of_dtype, none, arch, dtype=dtype)]
    return found + _row_of_exponentials_cases(False) + _row_of_exponentials_cases(True) + _loss_cases()


def name_of(options: tuple[str, ...]) -> str:
    """Of one of `VARIANTS`."""
    return "all options" if len(options) == len(OPTIONS) else " ".join(options) or "plain"


def _finish_cases() -> list[Case]:
    finish = dict.fromkeys(("state_ptr", "logp_ptr", "max_ptr", "logsum_ptr"), "*fp32")
    finish |= {"code_ptr": "*i64", "stride_k": "i32", "stride_state": "i32", "N": "i32"}
    block = {"IGNORED": constants.IGNORED, "INVALID": constants.INVALID, "BLOCK_N": plan.FINISH_BLOCK_N}
    found = []
    for variant, types, none in (("plain", {}, {"entropy_ptr": None}), ("entropy", {"entropy_ptr": "*fp32"}, {})):
        # Triton makes a constant of an integer that is 1.
        for label, parts, one in ((variant, {"K": "i32"}, {}), (f"{variant}, one part", {}, {"K": 1})):
            arguments = finish | types | parts
            found.append(Case("finish", label, rows.finish_kernel, arguments, {**block, **none, **one}, num_warps=4))
    return found


def _row_cases(
    variant: str, types: dict[str, str], none: Constants, dtype: str = "bf16", *, ragged: bool = False
) -> list[Case]:
    """`row_stats`, and `row_dlogits` with gradients of `dtype`."""
    shared = {"x_ptr": "*fp32", "code_ptr": "*i64", "stride_xn": "i32", "col0": "i32", "V": "i32"}
    stats = shared | {"state_ptr": "*fp32", "stride_state": "i32"}
    grads = shared | dict.fromkeys(("max_ptr", "logsum_ptr", "dlogp_ptr", "others_ptr"), "*fp32")
    grads |= {"dx_ptr": f"*{dtype}", "stride_dn": "i32"}
    logit_bits = 32 + (BITS[types["bias_ptr"]] if "bias_ptr" in types else 0)
    found = []
    for name, fn, arguments, settings, more in (
        ("row_stats", rows.row_stats_kernel, stats, plan.ROW_STATS, {"ENTROPY": "entropy_ptr" in types}),
        ("row_dlogits", rows.row_dlogits_kernel, grads, plan.ROW_DLOGITS, {}),
    ):
        settings = plan.CAPPED_ROWS if "softcap" in types else settings
        case = _case(
            name, variant, fn, arguments, types, none, {**more, "BLOCK_V": settings.block_v}, settings.num_warps
        )
        logits = settings.block_v // (32 * settings.num_warps)
        found.append(replace(case, ragged=ragged, logits=logits, logit_bits=logit_bits))
    return found


def _loss_cases() -> list[Case]:
    """The kernels on per-token numbers, with and without their optional arguments."""
    coefficients = {"dual_clip": "fp32", "entropy_coef": "fp32", "ref_ptr": "*fp32", "importance_ptr": "*fp32"}
    coefficients |= {"entropy_ptr": "*fp32", "dentropy_ptr": "*fp32"}
    ppo = dict.fromkeys(("logp_ptr", "old_ptr", "advantage_ptr", "weight_ptr", "loss_ptr"), "*fp32")
    ppo |= {"dlogp_ptr": "*fp32", "stats_ptr": "*fp32", "N": "i32"}
    ppo |= dict.fromkeys(("clip_low", "clip_high", "kl_coef"), "fp32")
    tokens = {"prm_ptr": "*fp32", "ref_ptr": "*fp32", "bounds_ptr": "*i64", "reward_ptr": "*fp32", "beta": "fp32"}
    prm: dict[str, str] = tokens | dict.fromkeys(("logit_ptr", "loss_ptr", "dlogp_ptr"), "*fp32") | {"mean": "fp32"}
    outcome, mask, ends = {"outcome_ptr": "*fp32"}, {"mask_ptr": "*fp32"}, {"end_ptr": "*i1"}
    found = []
    for variant, on in (("plain", False), ("all options", True)):
        for name, fn, arguments, optional, block in (
            ("ppo", losses.ppo_kernel, ppo, coefficients, {"BLOCK": losses.PPO_BLOCK}),
            ("prm", losses.prm_kernel, prm, outcome | mask, {"BLOCK": losses.SEQUENCE_BLOCK}),
            ("reward", losses.reward_kernel, tokens, mask | ends, {"BLOCK": losses.SEQUENCE_BLOCK, "EACH": not on}),
        ):
            types, none = (optional, {}) if on else ({}, dict.fromkeys(optional))
            found.append(_case(name, variant, fn, arguments, types, none, block, num_warps=4))
            if "bounds_ptr" in arguments:
                narrow = arguments | {"bounds_ptr": "*i32"}
                found.append(_case(name, f"{variant}, int32", fn, narrow, types, none, block, num_warps=4))
    return found + [_scale_case(dtype) for dtype in ("fp32", "bf16", "fp16")]


def _scale_case(dtype: str) -> Case:
    """In place for fp32, rounded to another tensor for others."""
    arguments = {"x_ptr": "*fp32", "factor_ptr": "*fp32", "out_ptr": f"*{dtype}", "numel": "i32"}
    constants = {"IN_PLACE": dtype == "fp32", "BLOCK": losses.SCALE_BLOCK}
    return Case("scale", dtype, losses.scale_kernel, arguments, constants, num_warps=4)


def _gemm(settings: plan.GemmSettings, dtype: str = "bf16") -> tuple[dict[str, str], Constants]:
    """Arguments and constants that both GEMM kernels take."""
    n, v, d = settings.block_n, settings.block_v, settings.block_d
    arguments = {"h": f"tensordesc<{dtype}[{n}, {d}]>", "w": f"tensordesc<{dtype}[{v}, {d}]>"}
    if not settings.tma:
        arguments = {"h": f"*{dtype}", "w": f"*{dtype}"}
    arguments |= {"code_ptr": "*i64"} | dict.fromkeys(("stride_hn", "stride_wv", "N", "V", "D"), "i32")
    constants = {
        "BLOCK_N": n, "BLOCK_V": v, "BLOCK_D": d, "TMA": settings.tma, "UPCAST": False,
        "WARP_SPECIALIZE": settings.warp_specialize, "FLATTEN": settings.flatten,
    }  # fmt: skip
    return arguments, constants


def _stats_case(
    variant: str, types: dict[str, str], none: Constants, arch: int, *, dtype: str = "bf16", rest: bool = False,
    ragged: bool = False, tiles: int | None = None,
) -> Case:  # fmt: skip
    """`fused_stats` on whole tiles, or on the rest of a vocabulary that is no multiple of them, nor here of 16."""
    settings = plan.stats_settings(arch, ragged=rest, bias="bias_ptr" in types, softcap="softcap" in types)
    arguments, constants = _gemm(settings, dtype)
    integers = ("stride_k", "stride_state", "first_col", *(["tiles"] if tiles is None else []))
    arguments |= {"partial_ptr": "*fp32"} | dict.fromkeys(integers, "i32")
    one = {} if tiles is None else {"tiles": tiles}
    constants = {**constants, **one, "RAGGED": rest, "ENTROPY": "entropy_ptr" in types}
    case = _case(
        "fused_stats", variant, fused.fused_stats_kernel, arguments, types, none, constants,
        settings.num_warps, settings.num_stages, is_gemm=True,
    )  # fmt: skip
    return replace(case, ragged=rest or ragged)


def _dlogits_case(
    variant: str, types: dict[str, str], none: Constants, arch: int, *, dtype: str = "bf16", ragged: bool = False
) -> Case:
    settings = plan.dlogits_settings(arch, entropy="dentropy_ptr" in types, softcap="softcap" in types)
    arguments, constants = _gemm(settings, dtype)
    arguments |= dict.fromkeys(("max_ptr", "logsum_ptr", "dlogp_ptr", "others_ptr"), "*fp32")
    tile = f"tensordesc<{dtype}[{settings.block_n}, {settings.block_v}]>"
    arguments |= {"dx": tile if settings.tma else f"*{dtype}", "stride_dn": "i32", "col0": "i32"}
    case = _case(
        "fused_dlogits", variant, fused.fused_dlogits_kernel, arguments, types, none,
        {**constants, "GROUP_ROWS": fused.GROUP_ROWS}, settings.num_warps, settings.num_stages, is_gemm=True,
    )  # fmt: skip
    return replace(case, ragged=ragged)


def _exponentials_case(
    variant: str, types: dict[str, str], none: Constants, arch: int, *, rest: bool = False, ragged: bool = False
) -> Case:  # fmt: skip
    """`exponentials` on whole tiles, or on the rest of the vocabulary."""
    settings = plan.exponentials_settings(arch, bias="bias_ptr" in types)
    arguments, constants = _gemm(settings)
    arguments |= {"offset_ptr": "*fp32", "partial_ptr": "*fp32"}
    arguments |= dict.fromkeys(("stride_en", "stride_k", "stride_state", "first_tile", "tiles"), "i32")
    tile = f"tensordesc<bf16[{settings.block_n}, {settings.block_v}]>"
    arguments |= {"e": tile if settings.tma else "*bf16"}
    constants = {
        **constants, "GROUP_ROWS": fused.GROUP_ROWS, "RAGGED": rest, "ENTROPY": "entropy_ptr" in types,
    }  # fmt: skip
    case = _case(
        "exponentials", variant, exponentials.exponentials_kernel, arguments, types, none, constants,
        settings.num_warps, settings.num_stages, is_gemm=True,
    )  # fmt: skip
    return replace(case, ragged=rest or ragged)


def _row_of_exponentials_cases(entropy: bool) -> list[Case]:
    """What comes before and after `exponentials`."""
    none = {} if entropy else {"bias_ptr": None, "temperature_ptr": None}
    types = {"bias_ptr": "*bf16", "temperature_ptr": "*fp32"} if entropy else {}
    offsets = {"h_ptr": "*bf16", "w_ptr": "*bf16", "code_ptr": "*i64", "offset_ptr": "*fp32"}
    offsets |= dict.fromkeys(("stride_hn", "stride_wv", "V", "D"), "i32")
    merge = {"partial_ptr": "*fp32", "state_ptr": "*fp32"}
    merge |= dict.fromkeys(("stride_k", "stride_state", "stride_out", "N", "K"), "i32")
    settle = {"e_ptr": "*bf16", "code_ptr": "*i64"}
    settle |= dict.fromkeys(("partial_ptr", "state_ptr", "max_ptr", "logsum_ptr", "dlogp_ptr", "factor_ptr"), "*fp32")
    settle |= dict.fromkeys(("stride_en", "stride_k", "stride_out", "N", "V", "K"), "i32")
    block = {"ROWS": exponentials.MERGE_ROWS, "TILES": exponentials.MERGE_TILES}
    variant = "all options" if entropy else "plain"
    return [
        _case(name, variant, fn, arguments, types, none, constants, num_warps=4)
        for name, fn, arguments, constants in (
            ("offsets", exponentials.offsets_kernel, offsets, {"BLOCK_D": exponentials.OFFSET_BLOCK_D}),
            ("merge_tiles", exponentials.merge_tiles_kernel, merge, {**block, "ENTROPY": entropy}),
            ("settle", exponentials.settle_kernel, settle, {**block, "BLOCK_V": 256, "COLUMNS": 64}),
        )
    ]


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
    multiples = [name for name in ALIGNED if not (case.ragged and name == "V")]
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in case.types.items()
        if kind.startswith("*") or name.startswith("stride") or name in multiples
    }
    source = ASTSource(case.fn, signature=signature, constexprs=case.constants, attrs=aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.kernel not in LOSSES:
        options |= common.EXACT
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilled = sass.resources(built.asm["cubin"])
    ptx = built.asm["ptx"]
    compiled = Compiled(
        kernel=case.kernel, variant=case.variant, arch=arch, registers=registers, spilled_bytes=spilled,
        shared_bytes=built.metadata.shared, num_warps=case.num_warps, num_stages=case.num_stages, is_gemm=case.is_gemm,
        instructions={name: len(re.findall(rf"^\s*(?:@\S+\s+)?{re.escape(name)}", ptx, re.M)) for name in INSTRUCTIONS},
        ragged=case.ragged,
    )  # fmt: skip
    return replace(compiled, **_memory(case, sass.disassembly(built.asm["cubin"])))


def _memory(case: Case, text: str) -> dict[str, Any]:
    """Widths and instructions a logit, as far as they can be told."""
    if case.kernel in STORES_TILES:
        through_tma = WIDE if "UTMASTG" in text else None
        return {"store_bits": through_tma or min(sass.accesses(text, "STG"), default=None)}
    loop = sass.main_loop(text) if case.logits else None
    if loop is None or case.logits is None:
        return {}
    # A compiler may unroll the loop, so the logits of a round are counted by what is read. No others are read in it.
    blocks, odd = divmod(sum(loop.loads), case.logits * case.logit_bits)
    if odd or not blocks:
        return {}
    found: dict[str, Any] = {
        "load_bits": min(loop.loads),
        "rest_load_bits": sass.narrowest(loop.outer_loads, 32 * case.logits),
        "per_logit": round(loop.instructions / (case.logits * blocks), 1),
    }
    if "dx_ptr" in case.types:
        found["store_bits"] = min(loop.stores, default=None)
        rest = BITS[case.types["dx_ptr"]] * case.logits
        found["rest_store_bits"] = sass.narrowest(loop.outer_stores, rest)
    return found


def faults(r: Compiled) -> list[str]:
    """What is wrong with a compiled kernel, one line each."""
    found = []
    if r.spilled_bytes and r.arch >= 90:
        found.append(f"spills {r.spilled_bytes} bytes")
    limit = min(SHARED_LIMIT[arch] for arch in (r.arch, *SAME_SETTINGS.get(r.arch, ())))
    if r.shared_bytes > limit:
        found.append(f"takes {r.shared_bytes} bytes of shared memory, {limit} are there")
    moves: list[tuple[str, int | None, int]] = []
    if r.kernel in PER_LOGIT:
        moves += [("load", r.load_bits, WIDE), ("load of the rest", r.rest_load_bits, WIDE)]
        most = PER_LOGIT[r.kernel][r.variant.split(",")[0]]
        if r.per_logit is not None and r.per_logit > most:
            found.append(f"takes {r.per_logit} instructions a logit, {most} at the most")
    if r.kernel.endswith("dlogits"):
        moves += [("store", r.store_bits, WIDE)]
    if r.kernel == "row_dlogits":
        moves += [("store of the rest", r.rest_store_bits, WIDE)]
    for what, width, least in moves:
        if width is None:
            found.append(f"has no {what} that could be told from others")
        elif width < least:
            found.append(f"has a {what} of {width} bits, {least} at the least")
    return [f"{r.kernel} ({r.variant}) on sm_{r.arch} {fault}" for fault in found]


def report(architectures: tuple[int, ...] = ARCHITECTURES, kernel: str | None = None) -> list[Compiled]:
    wanted = [
        (arch, index)
        for arch in architectures
        for index, case in enumerate(cases(arch))
        if kernel in (None, case.kernel)
    ]
    # Kernels cannot be sent to another process: it finds its own by their places.
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_compile_at, wanted, chunksize=4))


def _compile_at(place: tuple[int, int]) -> Compiled:
    arch, index = place
    return compile_case(cases(arch)[index], arch)


def table(results: list[Compiled]) -> str:
    head = (
        "kernel", "variant", "arch", "warps", "stages", "regs", "spilled B", "shared B", "load", "store",
        "rest load", "rest store", "a logit", "instructions",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = [head]
    for r in results:
        used = ", ".join(f"{name} ×{count}" for name, count in r.instructions.items() if count) or "–"
        numbers = (r.num_warps, r.num_stages, r.registers, r.spilled_bytes, r.shared_bytes)
        loops = (r.load_bits, r.store_bits, r.rest_load_bits, r.rest_store_bits, r.per_logit)
        loop = ("–" if n is None else str(n) for n in loops)
        lines.append((r.kernel, r.variant, f"sm_{r.arch}", *map(str, numbers), *loop, used))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument(
        "--arch", type=int, action="append", choices=SHARED_LIMIT, help="only this compute capability, such as 90"
    )
    parser.add_argument("--kernel", help="only this kernel")
    args = parser.parse_args()
    results = report(tuple(args.arch or ARCHITECTURES), args.kernel)
    print(f"triton {triton.__version__}")
    print(table(results))
    if args.json:
        args.json.write_text(
            json.dumps({"triton": triton.__version__, "kernels": [asdict(r) for r in results]}, indent=1) + "\n"
        )
    found = [fault for r in results for fault in faults(r)]
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
