"""Every kernel in every variant that selects other code, as its launcher would start it: what a report compiles."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from prime_kernels import constants, plan
from prime_kernels.kernels import exponentials, fused, losses, rows, scaling

Constants = Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel with one choice of optional arguments."""

    kernel: str
    variant: str
    fn: Any  # a jitted function, which has no type that one could name
    types: dict[str, str]  # argument -> Triton type; the ones left out are constants
    constants: Constants
    num_warps: int
    num_stages: int = 3
    is_gemm: bool = False
    ragged: bool = False  # V is no multiple of 16
    logits: int | None = None  # that a thread handles in one block
    logit_bits: int = 32  # that are read for each: itself and its bias


# Integers that are multiples of 16 at the shapes of real models.
ALIGNED = ("N", "V", "D", "col0")
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
        found += [_dlogits_case(variant, types, none, arch)]
        for kept in (False, True) if "softcap" not in on else (False,):
            label = f"{variant}, kept" if kept else variant
            found += [_exponentials_case(label, types, none, arch, kept=kept)]
            found += [_exponentials_case(f"{label}, rest", types, none, arch, kept=kept, rest=True)]
        if on and len(on) < len(OPTIONS):
            continue
        # The rest is tried with no option and with all.
        ragged = f"{variant}, V % 16"
        found += _row_cases(ragged, types, none, ragged=True)
        found += [_exponentials_case(ragged, types, none, arch, ragged=True)]
        found += [_exponentials_case(f"{variant}, one tile", types, none, arch, rest=True, tiles=1)]
        found += [_dlogits_case(ragged, types, none, arch, ragged=True)]
        for dtype in DTYPES:
            of_dtype = {name: kind.replace("bf16", dtype) for name, kind in types.items()}
            label = f"{variant}, {dtype}"
            rows = _row_cases(label, of_dtype, none, dtype)
            found += rows if on else rows[1:]  # without a bias, no statistics know of the dtype
            if dtype == "fp16":
                found += [_exponentials_case(label, of_dtype, none, arch, dtype=dtype)]
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
    grads = shared | dict.fromkeys(("max_ptr", "logsum_ptr", "dlogp_ptr", "target_ptr"), "*fp32")
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
    return found + [_scale_case(dtype) for dtype in ("fp32", "bf16", "fp16")] + _scale_rows_cases()


def _scale_case(dtype: str) -> Case:
    """In place for fp32, rounded to another tensor for others."""
    arguments = {"x_ptr": "*fp32", "factor_ptr": "*fp32", "out_ptr": f"*{dtype}", "numel": "i32"}
    constants = {"IN_PLACE": dtype == "fp32", "BLOCK": scaling.SCALE_BLOCK}
    return Case("scale", dtype, scaling.scale_kernel, arguments, constants, num_warps=4)


def _scale_rows_cases() -> list[Case]:
    """Hidden states and their gradient, when the upstream gradient is known; a chunk's before that."""
    shared = {"factor_ptr": "*fp32", "stride_x": "i32", "stride_out": "i32", "D": "i32"}
    optional = {"upstream_ptr": "*fp32"}
    block = {"BLOCK": scaling.SCALE_COLUMNS}
    found = []
    for variant, source, target, on in (
        ("states", "bf16", "bf16", True), ("gradient", "fp32", "bf16", True), ("sums", "fp32", "fp32", False),
    ):  # fmt: skip
        arguments = shared | {"x_ptr": f"*{source}", "out_ptr": f"*{target}"}
        types, none = (optional, {}) if on else ({}, dict.fromkeys(optional))
        found.append(
            _case("scale_rows", variant, scaling.scale_rows_kernel, arguments, types, none, block, num_warps=4)
        )
    return found


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


def _dlogits_case(
    variant: str, types: dict[str, str], none: Constants, arch: int, *, dtype: str = "bf16", ragged: bool = False
) -> Case:
    settings = plan.dlogits_settings(arch, entropy="dentropy_ptr" in types, softcap="softcap" in types)
    arguments, constants = _gemm(settings, dtype)
    arguments |= dict.fromkeys(("max_ptr", "logsum_ptr", "dlogp_ptr", "target_ptr"), "*fp32")
    tile = f"tensordesc<{dtype}[{settings.block_n}, {settings.block_v}]>"
    arguments |= {"dx": tile if settings.tma else f"*{dtype}", "stride_dn": "i32", "col0": "i32"}
    case = _case(
        "fused_dlogits", variant, fused.fused_dlogits_kernel, arguments, types, none,
        {**constants, "GROUP_ROWS": fused.GROUP_ROWS}, settings.num_warps, settings.num_stages, is_gemm=True,
    )  # fmt: skip
    return replace(case, ragged=ragged)


def _exponentials_case(
    variant: str, types: dict[str, str], none: Constants, arch: int, *, dtype: str = "bf16", kept: bool = False,
    rest: bool = False, ragged: bool = False, tiles: int | None = None,
) -> Case:  # fmt: skip
    """`exponentials` on whole tiles, or on the rest of a vocabulary that is no multiple of them."""
    settings = plan.exponentials_settings(arch, bias="bias_ptr" in types, softcap="softcap" in types)
    arguments, constants = _gemm(settings, dtype)
    arguments |= {"offset_ptr": "*fp32", "partial_ptr": "*fp32"}
    integers = ("stride_en", "stride_k", "stride_state", "first_tile", *(["tiles"] if tiles is None else []))
    arguments |= dict.fromkeys(integers, "i32")
    one = {} if tiles is None else {"tiles": tiles}
    constants = {
        **constants, **one, "GROUP_ROWS": fused.GROUP_ROWS, "RAGGED": rest, "ENTROPY": "entropy_ptr" in types,
    }  # fmt: skip
    if kept:
        tile = f"tensordesc<{dtype}[{settings.block_n}, {settings.block_v}]>"
        arguments |= {"e": tile if settings.tma else f"*{dtype}"}
    else:
        constants = {**constants, "e": None}
    case = _case(
        "exponentials", variant, exponentials.exponentials_kernel, arguments, types, none, constants,
        settings.num_warps, settings.num_stages, is_gemm=True,
    )  # fmt: skip
    return replace(case, ragged=rest or ragged)


def _row_of_exponentials_cases(entropy: bool) -> list[Case]:
    """What comes before and after `exponentials`."""
    none = {} if entropy else {"bias_ptr": None, "temperature_ptr": None, "softcap": None}
    types = {"bias_ptr": "*bf16", "temperature_ptr": "*fp32", "softcap": "fp32"} if entropy else {}
    offsets = {"h_ptr": "*bf16", "w_ptr": "*bf16", "code_ptr": "*i64", "offset_ptr": "*fp32", "target_ptr": "*fp32"}
    offsets |= dict.fromkeys(("stride_hn", "stride_wv", "V", "D"), "i32")
    merge = {"partial_ptr": "*fp32", "state_ptr": "*fp32"}
    merge |= dict.fromkeys(("stride_k", "stride_state", "stride_out", "N", "K"), "i32")
    settle = {"e_ptr": "*bf16", "code_ptr": "*i64"}
    settle |= dict.fromkeys(("partial_ptr", "state_ptr", "max_ptr", "logsum_ptr", "dlogp_ptr", "factor_ptr"), "*fp32")
    settle |= dict.fromkeys(("stride_en", "stride_k", "stride_out", "N", "V", "K"), "i32")
    # A softcap keeps no exponentials.
    of_offsets = {"BLOCK_D": exponentials.OFFSET_BLOCK_D, "KEPT": not entropy}
    block = {"ROWS": exponentials.MERGE_ROWS, "TILES": exponentials.MERGE_TILES}
    variant = "all options" if entropy else "plain"
    return [
        _case(name, variant, fn, arguments, types, none, constants, num_warps=4)
        for name, fn, arguments, constants in (
            ("offsets", exponentials.offsets_kernel, offsets, of_offsets),
            ("merge_tiles", exponentials.merge_tiles_kernel, merge, {**block, "ENTROPY": entropy}),
            ("settle", exponentials.settle_kernel, settle, {**block, "BLOCK_V": 256, "COLUMNS": 64}),
        )
    ]


def _case(
    kernel: str, variant: str, fn: Any, arguments: dict[str, str], types: dict[str, str], none: Constants,
    constants: Constants, num_warps: int, num_stages: int = 3, is_gemm: bool = False,
) -> Case:  # fmt: skip
    names = fn.arg_names
    types = arguments | {name: kind for name, kind in types.items() if name in names}
    constants = {**constants, **{name: None for name in none if name in names}}
    return Case(kernel, variant, fn, types, constants, num_warps, num_stages, is_gemm)
