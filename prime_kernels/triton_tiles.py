"""The two Triton strategies on a tile: cuBLAS + row kernels, and fused GEMMs. Imported only where one of them runs."""

import torch
from torch import Tensor

from . import gemm
from .devices import device_arch, processors
from .kernels import exponentials as kept
from .kernels import fused
from .kernels import rows as row_kernels
from .plan import blocks
from .tiles import Head, LogitTiles, RowGrads, Rows, RowStats, Tiles, empty_rows, row_stride


class TritonTiles(Tiles):
    """What both strategies share."""

    def finish(self, partials: Tensor, codes: Tensor) -> RowStats:
        stats = RowStats.empty(len(codes), partials, entropy=self.entropy)
        row_kernels.finish(partials, codes, stats.logp, stats.entropy, stats.max, stats.logsum)
        return stats


class ChunkedTiles(TritonTiles, LogitTiles):
    """cuBLAS writes a tile's logits in fp32, one row kernel reads each of them once."""

    def __init__(self, hidden: Tensor, entropy: bool) -> None:
        self.entropy = entropy
        self.dtype = gemm.operand(hidden[:0]).dtype
        self.bytes_per_logit = 4
        self.scratch = hidden.new_empty(0, dtype=torch.float32)

    def reserve(self, n: int, s: int, like: Tensor) -> None:
        if len(self.scratch) < n * row_stride(s):
            self.scratch = like.new_empty(0, dtype=torch.float32)  # the old one goes before the new one comes
            self.scratch = like.new_empty(n * row_stride(s), dtype=torch.float32)

    def empty_tile(self, n: int, s: int, like: Tensor) -> Tensor:
        # Every tile takes the same memory.
        self.reserve(n, s, like)
        return self.scratch[: n * row_stride(s)].view(n, row_stride(s))[:, :s]

    def fold(self, x: Tensor, rows: Rows, head: Head, state: Tensor) -> Tensor:
        row_kernels.row_stats(
            x, head.bias, rows.codes, rows.temperature, state[0], head.start, head.softcap, self.entropy
        )  # fmt: skip
        return state

    def gradient(self, x: Tensor, rows: Rows, head: Head, grads: RowGrads) -> tuple[Tensor, None]:
        n, s = x.shape
        dx = self.scratch[: n * x.stride(0)].view(self.dtype).view(n, -1)[:, :s]
        stats = grads.stats
        row_kernels.row_dlogits(
            x, head.bias, rows.codes, rows.temperature, stats.max, stats.logsum, stats.entropy,
            grads.dlogp, grads.at_target, grads.dentropy, dx, head.start, head.softcap,
        )  # fmt: skip
        return dx, None


class FusedTiles(TritonTiles, LogitTiles):
    """Triton GEMMs whose epilogue consumes the logits: nothing of vocabulary size in the forward.

    In one pass over a loss, `products` are the whole head's exponentials, kept in 16 bits; see `kernels.exponentials`.
    Their statistics wait here for `fold` and `gradient`.
    """

    def __init__(self, hidden: Tensor, entropy: bool) -> None:
        self.entropy = entropy
        # A gradient or an exponential, and an exponential's share of its tile's statistics.
        self.bytes_per_logit = gemm.operand(hidden[:0]).dtype.itemsize + 1 / 8
        if hidden.is_cuda:
            self.arch = device_arch(hidden.device)
            self.sms = processors(hidden.device)
        else:
            self.arch, self.sms = 0, 4

    def row_stats(self, rows: Rows, head: Head, col_step: int) -> Tensor:
        # As many rows at once as their tiles' statistics fit where a tile of gradients does.
        n = len(rows.codes)
        each = kept.tile_bytes(
            len(head.weight), self.arch, bias=head.bias is not None, softcap=head.softcap is not None
        )  # fmt: skip
        step = max(n * min(col_step, len(head.weight)) * rows.hidden.itemsize // each, 16)
        state = rows.hidden.new_empty((1, 4, n), dtype=torch.float32)
        for start, stop in blocks(n, step):
            at = rows[start:stop]
            state[0, :, start:stop] = kept.statistics(
                at.hidden, head.weight, head.bias, at.codes, at.temperature, head.softcap, self.arch, self.sms,
                self.entropy,
            )  # fmt: skip
        return state

    def empty_tile(self, n: int, s: int, like: Tensor) -> Tensor:
        return empty_rows(n, s, like)

    def products(self, rows: Rows, head: Head, col_step: int) -> Tensor:
        e = self.empty_tile(len(rows.hidden), len(head.weight), rows.hidden)
        self.partials, self.state = kept.exponentials(
            rows.hidden, head.weight, head.bias, rows.codes, rows.temperature, e, self.arch, self.sms,
            self.entropy,
        )  # fmt: skip
        return e

    def fold(self, x: Tensor, rows: Rows, head: Head, state: Tensor) -> Tensor:
        return self.state[None, :4]

    def gradient(self, x: Tensor, rows: Rows, head: Head, grads: RowGrads) -> tuple[Tensor, Tensor]:
        assert grads.dentropy is None
        assert head.softcap is None
        factor = kept.settle(
            x, self.partials, self.state, rows.codes, rows.temperature, grads.stats.max, grads.stats.logsum,
            grads.dlogp, self.arch, head.bias is not None,
        )  # fmt: skip
        return x, factor

    def dlogits(self, rows: Rows, head: Head, grads: RowGrads) -> Tensor:
        n, s = len(rows.hidden), len(head.weight)
        dx = self.empty_tile(n, s, rows.hidden)
        stats = grads.stats
        fused.fused_dlogits(
            rows.hidden, head.weight, head.bias, rows.codes, rows.temperature, stats.max, stats.logsum, stats.entropy,
            grads.dlogp, grads.at_target, grads.dentropy, dx, head.start, head.softcap, self.arch, self.sms,
        )  # fmt: skip
        return dx
