"""Tokens of several sequences: their boundaries, and what is summed over them."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def checked_cu_seqlens(cu_seqlens: Tensor) -> Tensor:
    """cu_seqlens, refused where its form is off; its numbers are looked at by `boundaries`, inside an operator."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must have shape [S + 1] with S >= 1, got {list(cu_seqlens.shape)}")
    return cu_seqlens


def boundaries(cu_seqlens: Tensor, T: int) -> list[int]:
    """cu_seqlens as numbers, refused where they do not cut T tokens into sequences of at least one."""
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T:
        raise ValueError(f"cu_seqlens must run from 0 to the number of tokens {T}, got {bounds[0]} to {bounds[-1]}")
    for s, length in enumerate(lengths(bounds)):
        if length < 1:
            raise ValueError(f"cu_seqlens must leave no sequence empty, got {length} tokens in sequence {s}")
    return bounds


def cu_seqlens_of(logp: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Of packed tokens [T] those given; of padded ones [S, L] every row."""
    if cu_seqlens is not None:
        if logp.dim() != 1:
            raise ValueError(f"prm_logp must have shape [T] with cu_seqlens, got {list(logp.shape)}")
        return checked_cu_seqlens(cu_seqlens)
    if logp.dim() != 2 or logp.numel() == 0:
        raise ValueError(f"prm_logp must have shape [S, L] without cu_seqlens, got {list(logp.shape)}")
    return torch.arange(logp.shape[0] + 1) * logp.shape[1]


def flat(t: Tensor | None, dtype: torch.dtype) -> Any:
    return None if t is None else t.to(dtype).reshape(-1).contiguous()


def lengths(bounds: list[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(bounds)]


def token_reward(prm_logp: Tensor, ref_logp: Tensor, mask: Tensor | None, beta: float) -> Tensor:
    """β·(prm − ref)·mask, exactly 0 where the mask is, whatever stands there."""
    reward = beta * (prm_logp - ref_logp)
    return reward if mask is None else torch.where(mask == 0, 0, reward * mask)
