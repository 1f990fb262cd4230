"""Loss and gradients in one pass over the vocabulary: 6NDV FLOP, the floor of a dense head.

For each chunk of tokens, over the whole vocabulary:

    x = X Wᵀ                    2NDV   logits in fp32, within the workspace
    statistics of x             each logit read once: log-prob and entropy of every token
    epilogue                    [n] numbers: the loss's derivatives dlogp, dentropy
    x ← dZ                      in place, in the dtype of the products
    dX = dZ W                   2NDV   fp32, one product over V
    dW += dZᵀ X                 2NDV   fp32

In bf16 strategy "fused" keeps e^{x − k} in 16 bits in place of x, and dZ is that times a factor of each row, see
`kernels.exponentials`. An epilogue is any loss that is a sum over tokens (or over sequences, on chunks aligned to
them). Where keeping does not pay, statistics of all tokens come first and the logits are computed again for the
gradients (8NDV); see `plan.plan_one_pass`.

The gradients are complete when the forward ends, and stay in fp32 until the loss's upstream gradient is known: backward
multiplies by it and rounds once, to the dtype of what they belong to. That gives the stored gradients away, so it can
run once.

Where products take fp16, dZ carries a power of two, the same for all rows. It is chosen on the device from the loss's
derivatives, so that small ones (a token's share of a large batch) are no subnormal numbers. The stored gradients carry
it as well, and backward takes it off with the upstream factor.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log
from typing import Any

import torch
from torch import Tensor

from . import gemm
from .constants import HAS_TRITON
from .devices import flop_per_byte, processors
from .operators import Derivative, Saved, is_shape_only
from .plan import LOSS_NUMBERS, TRITON_DTYPES, OnePass, blocks, plan_one_pass, plan_tiling
from .sweep import sweep_backward, sweep_forward
from .tiles import Head, LogitTiles, RowGrads, Rows, RowStats, Tiles

# Given which tokens and their results, returns ∂loss/∂logp [n] and ∂loss/∂entropy [n] or None. Called with slices
# that cover every token once.
Epilogue = Callable[[slice, RowStats], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which gradients are computed."""

    hidden: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias

    @classmethod
    def of(cls, call: object) -> "Wanted":
        """Those of an operator's call."""
        return cls(hidden=call.need_dh, weight=call.need_dw, bias=call.need_dbias)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Gradients of a loss in fp32 (fp64), times 1/unit; an empty tensor for each that is not wanted."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]
    unit: Tensor  # a number, a power of two

    @classmethod
    def empty(cls, hidden: Tensor, weight: Tensor, wanted: Wanted, *, zero: bool = False) -> "Gradients":
        """Room for the wanted gradients of hidden [..., D] and weight [V, D]."""
        dtype = gemm.stats_dtype(hidden.dtype)

        def room(shape: Sequence[int], want: bool) -> Tensor:
            new = hidden.new_zeros if zero and want else hidden.new_empty
            return new(shape if want else (0,), dtype=dtype)

        return cls(
            hidden=room(hidden.shape, wanted.hidden), weight=room(weight.shape, wanted.weight),
            bias=room(weight.shape[:1], wanted.bias), unit=hidden.new_ones((), dtype=dtype),
        )  # fmt: skip

    def shaped(self, hidden: Tensor) -> "Gradients":
        """With the gradient of hidden in its shape."""
        return replace(self, hidden=self.hidden.view(hidden.shape)) if self.hidden.dim() == 2 else self

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.hidden, self.weight, self.bias, self.unit))


def loss_and_gradients(
    tiles: Tiles, rows: Rows, head: Head, epilogue: Epilogue, wanted: Wanted, *, workspace: int,
    sequences: list[int] | None = None, together: bool = False,
) -> Gradients:  # fmt: skip
    """Call the epilogue for every token and return the gradients that follow from it.

    `sequences`, boundaries [S + 1] of sequences, keeps each of them within one call of the epilogue; `together` makes
    that call one for all tokens.
    """
    (N, D), V = rows.hidden.shape, len(head.weight)
    copies, itemsize = gemm.needs_copies(rows.hidden, head.weight), gemm.stats_dtype(rows.hidden.dtype).itemsize
    plan = OnePass(rows=0, cols=V, passes=2)
    if wanted and isinstance(tiles, LogitTiles):
        plan = plan_one_pass(
            max(N, 1), D, V, workspace=workspace, bytes_per_logit=tiles.bytes_per_logit, copies=copies,
            need_dw=wanted.weight, need_dh=wanted.hidden, flop_per_byte=flop_per_byte(rows.hidden.device),
            itemsize=itemsize, processors=processors(rows.hidden.device),
        )  # fmt: skip
    if plan.passes == 1 and isinstance(tiles, LogitTiles) and not (together and plan.rows < N):
        chunks = blocks(N, plan.rows) if sequences is None else aligned_chunks(sequences, plan.rows)
        return one_pass(tiles, rows, head, epilogue, wanted, chunks, plan)

    tiling = plan_tiling(
        max(N, 1), D, V, workspace=workspace, bytes_per_logit=tiles.bytes_per_logit, half=False, copies=copies,
        itemsize=itemsize, per_token=LOSS_NUMBERS,
    )  # fmt: skip
    stats = sweep_forward(tiles, rows, head, tiling)
    dlogp, dentropy = epilogue(slice(0, N), stats)
    sums = GradientSums(rows, head, Wanted(hidden=False, weight=False, bias=False))
    if not wanted:
        return sums.found
    grads = sums.scaled(RowGrads.of(rows.codes, stats, dlogp, dentropy), rows.temperature)
    found = sweep_backward(
        tiles, rows, head, grads, tiling,
        need_dh=wanted.hidden, need_dw=wanted.weight, need_dbias=wanted.bias, dtype=sums.found.unit.dtype,
    )  # fmt: skip
    nothing = sums.found
    dh, dw, dbias = (t if g is None else g for g, t in zip(found, nothing, strict=False))
    return Gradients(hidden=dh, weight=dw, bias=dbias, unit=sums.found.unit)


def aligned_chunks(boundaries: list[int], limit: int) -> list[tuple[int, int]]:
    """Runs of whole sequences of at most `limit` tokens each; a longer sequence is a run of its own."""
    chunks: list[tuple[int, int]] = []
    start = 0
    for begin, end in pairwise(boundaries):
        if end - start > limit and start < begin:
            chunks.append((start, begin))
            start = begin
    chunks.append((start, boundaries[-1]))
    return chunks


def one_pass(
    tiles: LogitTiles, rows: Rows, head: Head, epilogue: Epilogue, wanted: Wanted, chunks: list[tuple[int, int]],
    plan: OnePass,
) -> Gradients:  # fmt: skip
    """The pass of this module's docstring over the given chunks.

    Of a chunk that is longer than the plan's, a sequence that needs the epilogue as a whole, the statistics come first
    and its logits are computed again.
    """
    sums = GradientSums(rows, head, wanted)
    tiles.reserve(max((min(stop - start, plan.rows) for start, stop in chunks), default=0), len(head.weight), sums.like)
    for start, stop in chunks:
        pieces = [slice(start + a, start + b) for a, b in blocks(stop - start, plan.rows)]
        stats = RowStats.empty(stop - start, sums.like, entropy=tiles.entropy)
        x: Tensor | None = None
        for at in pieces:
            x = None  # the next ones come in their place
            block = rows[at]
            x = tiles.products(block, head, plan.cols)
            stats[at.start - start : at.stop - start] = tiles.results(x, block, head)
        here = slice(start, stop)
        grads = RowGrads.of(rows.codes[here], stats, *epilogue(here, stats))
        grads = sums.scaled(grads, None if rows.temperature is None else rows.temperature[here])
        for at in pieces:
            if len(pieces) > 1:
                x = None
                block = rows[at]
                x = tiles.products(block, head, plan.cols)
            assert x is not None
            of_piece = grads[at.start - start : at.stop - start]
            dz, factor = tiles.gradient(x, block, head, of_piece)
            x = None
            sums.add(at, block, dz, factor, of_piece.dead, plan.cols)
            del dz
    return sums.done()


# Where the largest derivative of a row of fp16 lies, a power of two, when the factor is chosen; and between which it
# may wander before another one is. fp16 reaches from 2⁻²⁴ to 2¹⁶, a row's dZ is at most its derivative.
CHOSEN, LEAST, MOST = 11, 8, 14
# Between which the factor's exponent may lie; and how much larger it may be than for the chunk with the largest
# derivatives, so that what that chunk gave stays in fp32's range. Smaller ones would be nothing beside it in fp16.
EXPONENTS, SPREAD = (-120, 100), 60


class GradientSums:
    """Gradients as they add up, chunk by chunk."""

    def __init__(self, rows: Rows, head: Head, wanted: Wanted) -> None:
        self.rows, self.head = rows, head
        self.found = Gradients.empty(rows.hidden, head.weight, wanted)
        self.like = self.found.unit  # for new tensors in the sums' dtype
        self.started = 0  # tokens that have been added
        self.scales = gemm.operand(rows.hidden[:0]).dtype is torch.float16
        if self.scales:
            self.exponent = torch.zeros((), dtype=torch.int32, device=rows.hidden.device)
            self.limit = torch.full_like(self.exponent, EXPONENTS[1])

    def scaled(self, grads: RowGrads, temperature: Tensor | None) -> RowGrads:
        """A chunk's derivatives in the sums' unit, which changes where these would be too small or too large for it."""
        if not self.scales:
            return grads
        # |dZ| ≤ (|dlogp|·(1 − p_target) + |dentropy|·min(log V, 2H))/τ: a row that is sure of its target has no say.
        size = grads.dlogp.abs() * grads.others
        if grads.dentropy is not None:
            assert grads.stats.entropy is not None
            most = log(max(len(self.head.weight), 2))
            size = size + grads.dentropy.abs() * (2 * grads.stats.entropy).clamp(0, most)
        if temperature is not None:
            size = size / temperature
        largest = torch.where(size.isfinite(), size, 0).amax() if len(size) else size.new_zeros(())
        magnitude = torch.frexp(largest).exponent
        now = self.exponent + magnitude
        keep = (largest == 0) | ((now >= LEAST) & (now <= MOST) & (self.started > 0))
        chosen = torch.minimum((CHOSEN - magnitude).clamp(min=EXPONENTS[0]), self.limit)
        exponent = torch.where(keep, self.exponent, chosen)
        self.limit = torch.where(keep, self.limit, torch.minimum(self.limit, exponent + SPREAD))
        if self.started:
            change = _power_of_two(exponent - self.exponent)
            for sums in (self.found.hidden.view(-1)[: self.started * self.rows.hidden.shape[1]],
                         self.found.weight, self.found.bias):  # fmt: skip
                rescale(sums, change)
        self.exponent = exponent
        self.found = replace(self.found, unit=_power_of_two(-exponent))
        return grads.times(_power_of_two(exponent))

    def add(
        self, at: slice, block: Rows, dz: Tensor, factor: Tensor | None, dead: Tensor, col_step: int
    ) -> None:  # fmt: skip
        """Add what dZ [n, V] of tokens `at` gives, a factor of each row [n] still to be applied to it."""
        found, head, V = self.found, self.head, len(self.head.weight)
        of_bias, of_weight, of_hidden = (len(t) > 0 for t in (found.bias, found.weight, found.hidden))
        dh = found.hidden[at] if of_hidden else None
        if of_bias:
            total = gemm.column_sums(dz, found.bias.dtype, factor)
            found.bias.add_(total) if self.started else found.bias.copy_(total)
        if of_weight:
            room = self._room(block, dh)
            if factor is None:
                block = block.without(dead, room)
            else:
                block = replace(block, hidden=scale_rows(block.hidden, factor, out=room))
            for c0, c1 in blocks(V, col_step):
                if self.started:
                    gemm.addmm(found.weight[c0:c1], dz[:, c0:c1].t(), block.hidden)
                else:  # the first chunk writes what the others add to
                    gemm.mm(dz[:, c0:c1].t(), block.hidden, out=found.weight[c0:c1])
        if dh is not None:
            if col_step >= V:
                gemm.mm(dz, head[0:V].weight, out=dh)
            else:
                dh.zero_()
                for c0, c1 in blocks(V, col_step):
                    gemm.addmm(dh, dz[:, c0:c1], head[c0:c1].weight)
            if factor is not None:
                scale_rows(dh, factor, out=dh)
        self.started = at.stop

    def _room(self, block: Rows, dh: Tensor | None) -> Tensor | None:
        """Memory for hidden states without dead ones: where they are a copy already, or dh's, which is written last."""
        if gemm.needs_upcast(self.rows.hidden):
            return block.hidden
        return None if dh is None else dh.view(block.hidden.dtype)[:, : block.hidden.shape[1]]

    def done(self) -> Gradients:
        if not self.started:
            for t in (self.found.weight, self.found.bias):
                t.zero_()
        return self.found


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in fp32, exactly; 0 below its normal numbers."""
    return ((exponent.clamp(-127, 127) + 127).to(torch.int32) << 23).view(torch.float32)


def rescale(t: Tensor, factor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """t·factor, a number on the device, rounded once to `dtype`; in t's own memory where that is its dtype.

    There, times 1 costs nothing, and the host never waits.
    """
    out = t if dtype in (None, t.dtype) else torch.empty_like(t, dtype=dtype)
    if t.is_cuda and HAS_TRITON and t.dtype in TRITON_DTYPES:
        from .kernels import scaling

        with torch.cuda.device(t.device):
            scaling.scale(t, factor, out)
        return out
    if t.is_cuda or factor != 1:
        t.mul_(factor)
    return t if out is t else out.copy_(t)


def scale_rows(
    t: Tensor, factor: Tensor, *, dtype: torch.dtype | None = None, out: Tensor | None = None,
    upstream: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """t [n, D] times a factor of each row [n] and a number, rounded once; 0 where the factor is, whatever a row holds.

    In one pass on CUDA. The result has `dtype`, or t's, or lies in `out`, which may be t.
    """
    dtype = out.dtype if out is not None else dtype or t.dtype
    plain = not is_shape_only(t, factor) and not torch._C._functorch.is_batchedtensor(factor)
    if t.is_cuda and HAS_TRITON and t.dtype in TRITON_DTYPES and plain:
        from .kernels import scaling

        with torch.cuda.device(t.device):
            return scaling.scale_rows(t, factor, torch.empty_like(t, dtype=dtype) if out is None else out, upstream)
    scaled = t * (factor if upstream is None else factor * upstream)[:, None]
    scaled = scaled.masked_fill((factor == 0)[:, None], 0).to(dtype)
    return scaled if out is None else out.copy_(scaled)


def give_away(state: dict[str, Any]) -> None:
    """Note in a call's state that its stored gradients go; refuse it a second time, before they are looked at."""
    if state.get("spent"):
        raise RuntimeError("a one-pass loss gives its stored gradients away in backward, which can run once")
    state["spent"] = True


def stored(tensors: Sequence[Tensor], upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """In backward: the `Gradients` that the forward stored, times the loss's upstream gradient, in their own memory.

    A graph that is being traced gets a plain product.
    """
    *gradients, unit = tensors
    factor = upstream * unit
    if is_shape_only(unit, upstream):
        return [(t * factor).to(dtype) for t in gradients]
    return [rescale(t, factor, dtype) for t in gradients]


def of_stored_gradients(results: int) -> Derivative:
    """The derivative of an operator whose results are a loss, `results − 1` others, and the fields of `Gradients`."""

    def gradients(saved: Saved, upstream: Tensor) -> dict[str, Tensor]:
        give_away(saved.state)
        found = stored(saved.tensors, upstream, saved.dtypes["hidden"])
        return dict(zip(("hidden", "weight", "bias"), found, strict=True))

    return Derivative(results=1, keep=lambda call, output: output[results:], gradients=gradients)
