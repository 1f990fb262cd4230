"""Work on one tile of logits: what every strategy offers, and plain torch, the first of the three.

A tile is some tokens (`Rows`) against some vocabulary columns (`Head`). Each strategy offers the same steps, and the
sweeps of `sweep.py` and `onepass.py` are written once on top of them. The two Triton strategies are in
`triton_tiles.py`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from math import log

import torch
from torch import Tensor

from . import constants, gemm
from .plan import blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Tokens and what belongs to each."""

    hidden: Tensor  # [n, D]
    codes: Tensor  # [n] int64: the target's column among this process's, or IGNORED, or INVALID
    temperature: Tensor | None  # [n] in the logits' dtype

    def __getitem__(self, at: slice) -> "Rows":
        temperature = None if self.temperature is None else self.temperature[at]
        return Rows(hidden=gemm.operand(self.hidden[at]), codes=self.codes[at], temperature=temperature)

    def without(self, dead: Tensor, room: Tensor | None = None) -> "Rows":
        """These tokens, the hidden states of dead ones 0: in dW = dZᵀ·X their dZ is 0, but 0·NaN would be NaN.

        The copy lies in `room` where that is given, which may be the states' own memory where they are a copy already.
        """
        room = torch.empty_like(self.hidden) if room is None else room
        return replace(self, hidden=torch.where(dead[:, None], room.new_zeros(()), self.hidden, out=room))


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Consecutive vocabulary columns: their weights, and what turns products into logits."""

    weight: Tensor  # [s, D]
    bias: Tensor | None  # [s]
    softcap: float | None
    start: int = 0  # the first one's column

    def __getitem__(self, at: slice) -> "Head":
        bias = None if self.bias is None else self.bias[at]
        return replace(self, weight=gemm.operand(self.weight[at]), bias=bias, start=self.start + at.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStats:
    """Of each row [n]: results, and the log-sum-exp in two parts so that neither is rounded to the other's size."""

    logp: Tensor
    entropy: Tensor | None  # None where it was not asked for
    max: Tensor
    logsum: Tensor  # logsumexp − max

    @classmethod
    def empty(cls, n: int, like: Tensor, *, entropy: bool) -> "RowStats":
        """Room for n rows, in the dtype of `like`."""
        new = partial(like.new_empty, n)
        return cls(logp=new(), entropy=new() if entropy else None, max=new(), logsum=new())

    def __getitem__(self, at: slice) -> "RowStats":
        entropy = None if self.entropy is None else self.entropy[at]
        return RowStats(logp=self.logp[at], entropy=entropy, max=self.max[at], logsum=self.logsum[at])

    def __setitem__(self, at: slice, rows: "RowStats") -> None:
        self.logp[at], self.max[at], self.logsum[at] = rows.logp, rows.max, rows.logsum
        if self.entropy is not None and rows.entropy is not None:
            self.entropy[at] = rows.entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGrads:
    """Of each row [n]: its statistics and the loss's derivatives with respect to its results.

    A row whose derivatives are all 0 is dead: its gradient is exactly 0, whatever its hidden state holds.
    """

    stats: RowStats
    dlogp: Tensor
    dentropy: Tensor | None
    at_target: Tensor  # the loss's derivative with respect to the target's logit

    @classmethod
    def of(cls, codes: Tensor, stats: RowStats, dlogp: Tensor, dentropy: Tensor | None) -> "RowGrads":
        ignored = codes == constants.IGNORED
        dlogp = dlogp.masked_fill(ignored, 0).contiguous()
        if dentropy is not None:
            dentropy = dentropy.masked_fill(ignored, 0).contiguous()
        del ignored
        # In few numbers at once: `plan_tiling` counts them.
        at_target = torch.expm1(stats.logp).neg_().mul_(dlogp)
        if dentropy is not None:
            assert stats.entropy is not None
            # ∂H/∂z_t = −p_t·(log p_t + H); of a banned target 0·−inf is not 0.
            of_p = stats.logp.clamp(min=exp_floor(stats.logp.dtype)).add_(stats.entropy).mul_(dentropy)
            at_target.addcmul_(of_p, stats.logp.exp(), value=-1)
        return cls(stats=stats, dlogp=dlogp, dentropy=dentropy, at_target=at_target)

    @property
    def others(self) -> Tensor:
        """1 − p_target [n]."""
        return torch.expm1(self.stats.logp).neg_()

    def times(self, factor: Tensor) -> "RowGrads":
        """Of the loss times a number."""
        dentropy = None if self.dentropy is None else self.dentropy * factor
        return replace(self, dlogp=self.dlogp * factor, dentropy=dentropy, at_target=self.at_target * factor)

    @property
    def dead(self) -> Tensor:
        """[n] bool."""
        return self.dlogp == 0 if self.dentropy is None else (self.dlogp == 0) & (self.dentropy == 0)

    def __getitem__(self, at: slice) -> "RowGrads":
        dentropy = None if self.dentropy is None else self.dentropy[at]
        return RowGrads(stats=self.stats[at], dlogp=self.dlogp[at], dentropy=dentropy, at_target=self.at_target[at])


def exp_floor(dtype: torch.dtype) -> float:
    """A number whose exponential is 0."""
    return 2 * log(torch.finfo(dtype).tiny)


class Tiles(ABC):
    """The steps on one tile; each strategy implements them."""

    bytes_per_logit: float  # scratch memory a logit of a tile, at the most
    entropy: bool  # whether statistics are for the entropy, too

    @abstractmethod
    def row_stats(self, rows: Rows, head: Head, col_step: int) -> Tensor:
        """Partial statistics [K, 4, n] over all columns of the head."""

    @abstractmethod
    def dlogits(self, rows: Rows, head: Head, grads: RowGrads) -> Tensor:
        """Gradient [n, s] of the tile's products, in the dtype products take."""

    @abstractmethod
    def finish(self, partials: Tensor, codes: Tensor) -> RowStats:
        """Results of each row from its partial statistics."""


class LogitTiles(Tiles):
    """Tiles whose logits are in memory: products, then statistics of them, then their gradient in their place."""

    def reserve(self, n: int, s: int, like: Tensor) -> None:
        """Make room for tiles of up to [n, s] logits at once, where tiles share their memory."""

    def products(self, rows: Rows, head: Head, col_step: int) -> Tensor:
        """hidden·weightᵀ [n, s] in fp32 (fp64), computed `col_step` columns at a time."""
        x = self.empty_tile(len(rows.codes), len(head.weight), rows.hidden)
        if len(head.weight) <= col_step:
            return gemm.mm(rows.hidden, head[0 : len(head.weight)].weight.t(), out=x)
        for start, stop in blocks(len(head.weight), col_step):
            gemm.mm(rows.hidden, head[start:stop].weight.t(), out=x[:, start:stop])
        return x

    @abstractmethod
    def empty_tile(self, n: int, s: int, like: Tensor) -> Tensor:
        """Memory for products [n, s]."""

    @abstractmethod
    def fold(self, x: Tensor, rows: Rows, head: Head, state: Tensor) -> Tensor:
        """The running statistics [1, 4, n] with those of products x [n, s]; leaves x as it is."""

    @abstractmethod
    def gradient(self, x: Tensor, rows: Rows, head: Head, grads: RowGrads) -> tuple[Tensor, Tensor | None]:
        """Gradient of products x [n, s], which it consumes: a tensor, and a factor of each row [n] or None."""

    def results(self, x: Tensor, rows: Rows, head: Head) -> RowStats:
        """Results of each row from the products x [n, V] of the whole head; leaves x as it is."""
        return self.finish(self.fold(x, rows, head, empty_state(len(rows.codes), rows.hidden)), rows.codes)

    def row_stats(self, rows: Rows, head: Head, col_step: int) -> Tensor:
        state = empty_state(len(rows.codes), rows.hidden)
        for start, stop in blocks(len(head.weight), col_step):
            part = head[start:stop]
            x = self.products(rows, part, col_step)
            state = self.fold(x, rows, part, state)
            del x, part  # before the next ones are made
        return state

    def dlogits(self, rows: Rows, head: Head, grads: RowGrads) -> Tensor:
        dz, factor = self.gradient(self.products(rows, head, len(head.weight)), rows, head, grads)
        assert factor is None
        return dz


def row_stride(s: int) -> int:
    """Elements from one row of s numbers to the next where rows start at multiples of `PADDED` elements."""
    return -(-s // constants.PADDED) * constants.PADDED


def empty_rows(n: int, s: int, like: Tensor) -> Tensor:
    """Memory for [n, s] numbers in such rows."""
    return like.new_empty((n, row_stride(s)))[:, :s]


def empty_state(n: int, like: Tensor) -> Tensor:
    """Running statistics of no columns [1, 4, n]: (max, sum, moment, target)."""
    state = like.new_zeros((1, 4, n), dtype=gemm.stats_dtype(like.dtype))
    state[:, 0].fill_(constants.FLOOR)
    return state


def merge_partials(partials: Tensor) -> Tensor:
    """One partial statistic [1, 4, n] of the columns of K of them [K, 4, n]."""
    m, s, u, target = partials.unbind(1)
    top = m.amax(0)
    shift = m - top
    scale = shift.exp()
    return torch.stack((top, (s * scale).sum(0), (scale * (u + s * shift)).sum(0), target.sum(0)))[None]


class TorchTiles(LogitTiles):
    """Plain torch on any device and in fp64 too; every temporary of tile size is reused in place."""

    def __init__(self, hidden: Tensor, entropy: bool) -> None:
        self.entropy = entropy
        self.dtype = gemm.stats_dtype(hidden.dtype)
        self.exp_floor = exp_floor(self.dtype)
        # Logits, their exponentials, tanh under a softcap; on a GPU also the gradient in 16 bits.
        self.bytes_per_logit = 3 * self.dtype.itemsize + (2 if hidden.is_cuda else 0)

    def empty_tile(self, n: int, s: int, like: Tensor) -> Tensor:
        return like.new_empty((n, s), dtype=self.dtype)

    def _logits(self, z: Tensor, rows: Rows, head: Head) -> tuple[Tensor, Tensor | None]:
        """z [n, s] in place of products and, under a softcap, tanh of the capped product."""
        if head.bias is not None:
            z += head.bias
        tanh = None
        if head.softcap is not None:
            tanh = z.div_(head.softcap).tanh_()
            z = tanh * head.softcap
        if rows.temperature is not None:
            z /= _positive(rows.temperature)[:, None]
        return z, tanh

    def fold(self, x: Tensor, rows: Rows, head: Head, state: Tensor) -> Tensor:
        z = self._logits(x.clone(), rows, head)[0]
        column, owned = _target_columns(rows.codes, head)
        target = z.gather(1, column).squeeze(1).masked_fill_(~owned, 0)
        # The target leaves the row: its logit becomes −inf, its exponential 0.
        z.scatter_(1, column, torch.where(owned, -torch.inf, z.gather(1, column).squeeze(1))[:, None])
        m = z.amax(1).clamp_(min=constants.FLOOR)
        e = z.sub_(m[:, None]).exp()
        s = e.sum(1)
        u = e.mul_(z.clamp_(min=self.exp_floor)).sum(1) if self.entropy else torch.zeros_like(s)
        return merge_partials(torch.cat((state, torch.stack((m, s, u, target))[None])))

    def finish(self, partials: Tensor, codes: Tensor) -> RowStats:
        m, s, u, target = merge_partials(partials)[0]
        top = torch.maximum(m, target)
        shift = m - top
        others = s * shift.exp()
        e_target = (target - top).exp()
        total = others + e_target
        # Every logit is banned, or too small to tell from the floor.
        total.masked_fill_(total == 0, torch.nan)
        logsum = torch.where(target >= m, others.log1p(), total.log())
        logp = (target - top) - logsum
        ignored, invalid = codes == constants.IGNORED, codes == constants.INVALID
        entropy = None
        if self.entropy:
            # A bias of −inf may ban the target, and 0·−inf is not 0.
            of_target = e_target * (target - top).clamp(min=self.exp_floor)
            entropy = logsum - (shift.exp() * (u + s * shift) + of_target) / total
            entropy.masked_fill_(invalid, torch.nan).masked_fill_(ignored, 0)
        logsum.masked_fill_(invalid, torch.nan)
        logp = logp.masked_fill_(invalid, torch.nan).masked_fill_(ignored, 0)
        return RowStats(logp=logp, entropy=entropy, max=top, logsum=logsum)

    def gradient(self, x: Tensor, rows: Rows, head: Head, grads: RowGrads) -> tuple[Tensor, None]:
        # See kernels.common.logit_gradient for the formulas.
        z, tanh = self._logits(x, rows, head)
        stats, (column, owned) = grads.stats, _target_columns(rows.codes, head)
        logp = z.sub_(stats.max[:, None]).sub_(stats.logsum[:, None])
        p = logp.exp()
        if grads.dentropy is None:
            p *= -grads.dlogp[:, None]
            z = p
        else:
            assert stats.entropy is not None
            z = logp.clamp_(min=self.exp_floor).add_(stats.entropy[:, None]).mul_(grads.dentropy[:, None])
            z = z.add_(grads.dlogp[:, None]).mul_(p).neg_()
        z.scatter_(1, column, torch.where(owned, grads.at_target, z.gather(1, column).squeeze(1))[:, None])
        if tanh is not None:
            z *= tanh.square_().neg_().add_(1)
        if rows.temperature is not None:
            z /= _positive(rows.temperature)[:, None]
        return z.masked_fill_(grads.dead[:, None], 0).to(rows.hidden.dtype), None


def _positive(temperature: Tensor) -> Tensor:
    return torch.where((temperature > 0) & (temperature < torch.inf), temperature, torch.nan)


def _target_columns(codes: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """The target's index among the head's columns [n, 1] (0 where it is none of them), and whether it is one [n]."""
    column = codes - head.start
    owned = (column >= 0) & (column < len(head.weight))
    return torch.where(owned, column, 0)[:, None], owned
