"""Tokens of several sequences: their boundaries, and what is summed over them."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .checks import check_host_or, check_plain_tensor, is_captured, may_read
from .operators import is_shape_only


def checked_cu_seqlens(cu_seqlens: Tensor, tokens: Tensor) -> Tensor:
    """cu_seqlens, refused where its form is off; its numbers are looked at inside an operator."""
    check_plain_tensor("cu_seqlens", cu_seqlens, None)
    check_host_or("cu_seqlens", cu_seqlens, tokens.device)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must have shape [S + 1] with S >= 1, got {list(cu_seqlens.shape)}")
    return cu_seqlens


@dataclass(frozen=True, slots=True)
class Sequences:
    """Consecutive sequences of tokens."""

    bounds: Tensor  # [S + 1] where the tokens are
    host: list[int] | None  # the same numbers, where the host knows them
    poison: Tensor | None  # 0, or NaN where boundaries that the host did not read do not cut the tokens

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: Tensor, *, read: bool = False) -> "Sequences":
        """The sequences of tokens [T] by boundaries inside an operator.

        Boundaries on the host are checked and copied. On the tokens' device they are used as they are: no copy either
        way and no wait, unless the host has to `read` them.

        Raises:
            ValueError: boundaries that were read do not cut the tokens into sequences of at least one, or they are on
                the host while a CUDA graph is captured.
        """
        T = tokens.shape[0]
        cu_seqlens = cu_seqlens.contiguous()  # as kernels read it
        if cu_seqlens.device.type == "cpu":
            host = boundaries(cu_seqlens, T)
            return cls(bounds=moved("cu_seqlens", cu_seqlens, tokens.device), host=host, poison=None)
        if (read and not is_captured(tokens.device)) or may_read(cu_seqlens):
            return cls(bounds=cu_seqlens, host=boundaries(cu_seqlens, T), poison=None)
        good = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T) & (cu_seqlens.diff() > 0).all()
        poison = torch.where(good, 0.0, torch.nan).to(tokens.dtype)
        # Whatever the numbers are, nothing is read outside the tokens.
        return cls(bounds=cu_seqlens.clamp(0, T), host=None, poison=poison)

    @property
    def count(self) -> int:
        """How many; no `len`, which would make a symbol of a graph that is being traced a number."""
        return self.bounds.shape[0] - 1

    def __getitem__(self, at: slice) -> "Sequences":
        """Some of them, their tokens counted from the first's."""
        assert self.host is not None
        host = self.host[at.start : at.stop + 1]
        return Sequences(self.bounds[at.start : at.stop + 1] - host[0], [b - host[0] for b in host], None)

    def of_tokens(self, T: int) -> Tensor:
        """The sequence to which each of T tokens belongs [T]."""
        tokens = torch.arange(T, device=self.bounds.device, dtype=self.bounds.dtype)
        # In the range whatever the boundaries are: an index outside it would end the process.
        return torch.searchsorted(self.bounds[1:], tokens, right=True).clamp_(max=self.count - 1)

    def sums(self, t: Tensor) -> Tensor:
        """Σ of t [T] over each sequence [S], the same bits every time.

        Raises:
            ValueError: the host does not know the boundaries, and may not read them as a CUDA graph is captured.
        """
        if self.host is None and is_captured(self.bounds.device):
            raise ValueError("backend='torch' sums sequences on the host, no CUDA graph can hold it; use 'triton'")
        host = self.bounds.tolist() if self.host is None else self.host
        return torch.stack([part.sum() for part in t.split(lengths(host))])


def moved(name: str, t: Tensor, device: torch.device) -> Tensor:
    """t on the tokens' device; from the host without a wait, and never while a CUDA graph is captured.

    Raises:
        ValueError: t would have to be copied into a graph, which would go on to read the host's memory.
    """
    if t.device == device or device.type != "cuda" or torch.compiler.is_compiling() or is_shape_only(t):
        return t.to(device)
    if is_captured(device):
        raise ValueError(f"{name} must be on the tokens' device while a CUDA graph is captured, got one on the host")
    # A copy of our own: the user may write to the original before the device has read it.
    pinned = torch.empty_like(t, pin_memory=True).copy_(t)
    return pinned.to(device, non_blocking=True)


def boundaries(cu_seqlens: Tensor, T: int) -> list[int]:
    """cu_seqlens as numbers, refused where they do not cut T tokens into sequences of at least one."""
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T:
        raise ValueError(f"cu_seqlens must run from 0 to the number of tokens {T}, got {bounds[0]} to {bounds[-1]}")
    for s, length in enumerate(lengths(bounds)):
        if length < 1:
            raise ValueError(f"cu_seqlens must leave no sequence empty, got {length} tokens in sequence {s}")
    return bounds


def cu_seqlens_of(logp: Tensor, cu_seqlens: Tensor | None, use_triton: bool) -> Tensor:
    """Of packed tokens [T] those given; of padded ones [S, L] every row.

    The latter are made where they are used: kernels read them on the device, plain torch splits tokens on the host.
    """
    if cu_seqlens is not None:
        if logp.dim() != 1:
            raise ValueError(f"prm_logp must have shape [T] with cu_seqlens, got {list(logp.shape)}")
        return checked_cu_seqlens(cu_seqlens, logp)
    if logp.dim() != 2 or logp.numel() == 0:
        raise ValueError(f"prm_logp must have shape [S, L] without cu_seqlens, got {list(logp.shape)}")
    on_device = use_triton or is_captured(logp.device)
    return torch.arange(logp.shape[0] + 1, device=logp.device if on_device else "cpu") * logp.shape[1]


def lengths(bounds: list[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(bounds)]


def token_reward(prm_logp: Tensor, ref_logp: Tensor, mask: Tensor | None, beta: float) -> Tensor:
    """β·(prm − ref)·mask, exactly 0 where the mask is, whatever stands there."""
    reward = beta * (prm_logp - ref_logp)
    return reward if mask is None else torch.where(mask == 0, 0, reward * mask)
