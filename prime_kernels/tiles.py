"""The three ways to work on one tile of logits: plain torch, cuBLAS + row kernels, fused Triton GEMMs.

A tile is some tokens (`Rows`) against some vocabulary columns (`Head`). Each strategy offers the same steps, and the
sweeps of `sweep.py` and `onepass.py` are written once on top of them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import gemm
from .kernels import common, fused
from .kernels import rows as row_kernels
from .plan import Strategy, blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Tokens and what belongs to each."""

    hidden: Tensor  # [n, D]
    codes: Tensor  # [n] int64: the target's column among this process's, or IGNORED, or INVALID
    temperature: Tensor | None  # [n] in the logits' dtype

    def __getitem__(self, at: slice) -> "Rows":
        temperature = None if self.temperature is None else self.temperature[at]
        return Rows(hidden=gemm.operand(self.hidden[at]), codes=self.codes[at], temperature=temperature)


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
    entropy: Tensor
    max: Tensor
    logsum: Tensor  # logsumexp − max

    def __getitem__(self, at: slice) -> "RowStats":
        return RowStats(logp=self.logp[at], entropy=self.entropy[at], max=self.max[at], logsum=self.logsum[at])


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGrads:
    """Of each row [n]: its statistics and the loss's derivatives with respect to its results."""

    stats: RowStats
    dlogp: Tensor
    dentropy: Tensor | None
    others: Tensor  # 1 − p_target

    @classmethod
    def of(cls, stats: RowStats, dlogp: Tensor, dentropy: Tensor | None) -> "RowGrads":
        return cls(
            stats=stats,
            dlogp=dlogp.contiguous(),
            dentropy=None if dentropy is None else dentropy.contiguous(),
            others=torch.expm1(stats.logp).neg_(),
        )

    def __getitem__(self, at: slice) -> "RowGrads":
        dentropy = None if self.dentropy is None else self.dentropy[at]
        return RowGrads(stats=self.stats[at], dlogp=self.dlogp[at], dentropy=dentropy, others=self.others[at])


class Tiles(ABC):
    """The steps on one tile; each strategy implements them."""

    bytes_per_logit: int  # scratch memory a logit of a tile, at the most

    @abstractmethod
    def row_stats(self, rows: Rows, head: Head, col_step: int) -> Tensor:
        """Partial statistics [K, 4, n] over all columns of the head."""

    @abstractmethod
    def dlogits(self, rows: Rows, head: Head, grads: RowGrads) -> Tensor:
        """Gradient [n, s] of the tile's products, in the dtype products take."""

    def finish(self, partials: Tensor, codes: Tensor) -> RowStats:
        """Results of each row from its partial statistics."""
        logp, entropy, row_max, logsum = (partials.new_empty(len(codes)) for _ in range(4))
        row_kernels.finish(partials, codes, logp, entropy, row_max, logsum)
        return RowStats(logp=logp, entropy=entropy, max=row_max, logsum=logsum)


class LogitTiles(Tiles):
    """Tiles whose logits are in memory: products, then statistics of them, then their gradient in their place."""

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
    def gradient(self, x: Tensor, rows: Rows, head: Head, grads: RowGrads) -> Tensor:
        """Gradient of products x [n, s]; consumes x."""

    def row_stats(self, rows: Rows, head: Head, col_step: int) -> Tensor:
        state = empty_state(len(rows.codes), rows.hidden)
        for start, stop in blocks(len(head.weight), col_step):
            part = head[start:stop]
            x = self.products(rows, part, col_step)
            state = self.fold(x, rows, part, state)
            del x, part  # before the next ones are made
        return state

    def dlogits(self, rows: Rows, head: Head, grads: RowGrads) -> Tensor:
        return self.gradient(self.products(rows, head, len(head.weight)), rows, head, grads)


def empty_state(n: int, like: Tensor) -> Tensor:
    """Running statistics of no columns [1, 4, n]: (max, sum, moment, target)."""
    state = like.new_zeros((1, 4, n), dtype=gemm.stats_dtype(like.dtype))
    state[:, 0].fill_(common.FLOOR)
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

    def __init__(self, hidden: Tensor) -> None:
        self.dtype = gemm.stats_dtype(hidden.dtype)
        info = torch.finfo(self.dtype)
        self.exp_floor = 2 * torch.log(torch.tensor(info.tiny, dtype=torch.float64)).item()  # e^exp_floor is 0
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
        m = z.amax(1).clamp_(min=common.FLOOR)
        e = z.sub_(m[:, None]).exp()
        s = e.sum(1)
        u = e.mul_(z.clamp_(min=self.exp_floor)).sum(1)
        return merge_partials(torch.cat((state, torch.stack((m, s, u, target))[None])))

    def finish(self, partials: Tensor, codes: Tensor) -> RowStats:
        m, s, u, target = merge_partials(partials)[0]
        top = torch.maximum(m, target)
        shift = m - top
        others = s * shift.exp()
        e_target = (target - top).exp()
        logsum = torch.where(target >= m, others.log1p(), (others + e_target).log())
        logp = (target - top) - logsum
        entropy = logsum - (shift.exp() * (u + s * shift) + e_target * (target - top)) / (others + e_target)
        ignored, invalid = codes == common.IGNORED, codes == common.INVALID
        for result in (logp, entropy, logsum):
            result.masked_fill_(invalid, torch.nan)
        return RowStats(
            logp=logp.masked_fill_(ignored, 0), entropy=entropy.masked_fill_(ignored, 0), max=top, logsum=logsum
        )

    def gradient(self, x: Tensor, rows: Rows, head: Head, grads: RowGrads) -> Tensor:
        # See kernels.common.logit_gradient for the formulas.
        z, tanh = self._logits(x, rows, head)
        stats, (column, owned) = grads.stats, _target_columns(rows.codes, head)
        logp = z.sub_(stats.max[:, None]).sub_(stats.logsum[:, None])
        target_logp = logp.gather(1, column).squeeze(1)
        p = logp.exp()
        at_target = grads.dlogp * grads.others
        if grads.dentropy is None:
            p *= -grads.dlogp[:, None]
            z = p
        else:
            at_target -= grads.dentropy * target_logp.exp() * (target_logp.clamp(min=self.exp_floor) + stats.entropy)
            z = logp.clamp_(min=self.exp_floor).add_(stats.entropy[:, None]).mul_(grads.dentropy[:, None])
            z = z.add_(grads.dlogp[:, None]).mul_(p).neg_()
        z.scatter_(1, column, torch.where(owned, at_target, z.gather(1, column).squeeze(1))[:, None])
        if tanh is not None:
            z *= tanh.square_().neg_().add_(1)
        if rows.temperature is not None:
            z /= _positive(rows.temperature)[:, None]
        z.masked_fill_((rows.codes == common.IGNORED)[:, None], 0)
        return z.to(rows.hidden.dtype)


def _positive(temperature: Tensor) -> Tensor:
    return torch.where(temperature > 0, temperature, torch.nan)


def _target_columns(codes: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """The target's index among the head's columns [n, 1] (0 where it is none of them), and whether it is one [n]."""
    column = codes - head.start
    owned = (column >= 0) & (column < len(head.weight))
    return torch.where(owned, column, 0)[:, None], owned


class ChunkedTiles(LogitTiles):
    """cuBLAS writes a tile's logits in fp32, one row kernel reads each of them once."""

    def __init__(self, hidden: Tensor) -> None:
        self.dtype = gemm.operand(hidden[:0]).dtype
        self.bytes_per_logit = 4
        self.scratch = hidden.new_empty(0, dtype=torch.float32)

    def empty_tile(self, n: int, s: int, like: Tensor) -> Tensor:
        # Every tile takes the same memory; the first is the largest. Rows start at multiples of 32 bytes.
        stride = -(-s // 8) * 8
        if len(self.scratch) < n * stride:
            self.scratch = torch.empty(n * stride, dtype=torch.float32, device=like.device)
        return self.scratch[: n * stride].view(n, stride)[:, :s]

    def fold(self, x: Tensor, rows: Rows, head: Head, state: Tensor) -> Tensor:
        row_kernels.row_stats(x, head.bias, rows.codes, rows.temperature, state[0], head.start, head.softcap)
        return state

    def gradient(self, x: Tensor, rows: Rows, head: Head, grads: RowGrads) -> Tensor:
        n, s = x.shape
        dx = self.scratch[: n * x.stride(0)].view(self.dtype).view(n, -1)[:, :s]
        stats = grads.stats
        row_kernels.row_dlogits(
            x, head.bias, rows.codes, rows.temperature, stats.max, stats.logsum, stats.entropy,
            grads.dlogp, grads.others, grads.dentropy, dx, head.start, head.softcap,
        )  # fmt: skip
        return dx


class FusedTiles(Tiles):
    """Triton GEMMs whose epilogue consumes the logits: nothing of vocabulary size in the forward."""

    def __init__(self, hidden: Tensor) -> None:
        self.bytes_per_logit = gemm.operand(hidden[:0]).dtype.itemsize
        if hidden.is_cuda:
            self.arch = device_arch(hidden.device)
            self.sms = torch.cuda.get_device_properties(hidden.device).multi_processor_count
        else:
            self.arch, self.sms = 0, 4

    def row_stats(self, rows: Rows, head: Head, col_step: int) -> Tensor:
        return fused.fused_stats(
            rows.hidden, head.weight, head.bias, rows.codes, rows.temperature, head.softcap, self.arch, self.sms
        )

    def dlogits(self, rows: Rows, head: Head, grads: RowGrads) -> Tensor:
        dx = rows.hidden.new_empty((len(rows.hidden), len(head.weight)))
        stats = grads.stats
        fused.fused_dlogits(
            rows.hidden, head.weight, head.bias, rows.codes, rows.temperature, stats.max, stats.logsum, stats.entropy,
            grads.dlogp, grads.others, grads.dentropy, dx, head.start, head.softcap, self.arch, self.sms,
        )  # fmt: skip
        return dx


def device_arch(device: torch.device) -> int:
    """Compute capability as one number (90 for sm_90); 0 for a CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def make_tiles(strategy: Strategy, hidden: Tensor) -> Tiles:
    """The tile operations of `strategy` for hidden states like `hidden`."""
    if strategy == "torch":
        return TorchTiles(hidden)
    if strategy == "chunked":
        return ChunkedTiles(hidden)
    return FusedTiles(hidden)
