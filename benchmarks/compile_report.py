"""Compile every kernel with its default settings for sm_80, sm_90, sm_100 and sm_120, without a GPU, and report.

    python -m benchmarks.compile_report [--json FILE] [--arch 90] [--kernel exponentials]

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
from benchmarks.compile_cases import ALIGNED, BITS, Case, cases
from prime_kernels.kernels import common

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
        "plain": 15.0, "entropy": 20.0, "temperature": 16.0, "temperature entropy": 21.0, "bias": 18.0,
        "softcap": 61.0, "all options": 72.5,
    },
    "row_dlogits": {
        "plain": 12.0, "entropy": 21.0, "temperature": 14.0, "temperature entropy": 23.0, "bias": 15.5,
        "softcap": 62.5, "all options": 73.5,
    },
}  # fmt: skip
LOSSES = ("ppo", "prm", "reward", "scale", "scale_rows")
STORES_TILES = ("fused_dlogits", "exponentials")
# Bytes on the stack that a version of Triton may take where others keep all in registers. An H100's tile stays as it
# was measured under 3.6: the next smaller one takes 1.4 times as long.
SPILLS: dict[str, dict[int, int]] = {"3.6": {100: 8}, "3.9": {90: 400, 100: 32, 120: 24}}
INSTRUCTIONS = ("mma.sync", "wgmma", "tcgen05.mma", "cp.async.cg", "cp.async.bulk.tensor", "setmaxnreg")


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
    serial: bool = False  # no two of its products are in flight


def compile_case(case: Case, arch: int) -> Compiled:
    """Compile for `arch`; pointers and strides are taken to be multiples of 16, as those of real shapes are."""
    names = case.fn.arg_names
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
    text = sass.disassembly(built.asm["cubin"])
    return replace(compiled, serial=sass.serial(text), **_memory(case, text))


def _memory(case: Case, text: str) -> dict[str, Any]:
    """Widths and instructions a logit, as far as they can be told."""
    if case.kernel in STORES_TILES and case.constants.get("e", 0) is not None:
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
    version = ".".join(triton.__version__.split(".")[:2])
    if r.spilled_bytes > SPILLS.get(version, {}).get(r.arch, 0) and r.arch >= 90:
        found.append(f"spills {r.spilled_bytes} bytes")
    limit = min(SHARED_LIMIT[arch] for arch in (r.arch, *SAME_SETTINGS.get(r.arch, ())))
    if r.shared_bytes > limit:
        found.append(f"takes {r.shared_bytes} bytes of shared memory, {limit} are there")
    if r.serial:  # 1.36 bare GEMMs instead of 1.05, measured
        found.append("waits for each of its products before the next one")
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
