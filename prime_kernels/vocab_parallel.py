"""A vocabulary whose rows are spread over the ranks of a process group, in rank order and in any sizes.

Forward: each rank computes partial statistics of its columns; [4, n] numbers a rank are gathered and merged.
Backward: each rank has its rows of dW; dX, a sum over the vocabulary, is all-reduced in fp32.
The group travels by name, as torch.compile wants it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .constants import IGNORED, INVALID
from .tiles import merge_partials


def target_codes(targets: Tensor, V: int, ignore_index: int, group_name: str) -> tuple[Tensor, int | Tensor]:
    """Targets as columns of this process's V, and the size of the whole vocabulary.

    A target that is ignore_index has the code IGNORED, one outside the whole vocabulary INVALID.
    """
    start: int | Tensor = 0
    total: int | Tensor = V
    if group_name:
        # Kept on the device: offsets are added there and the host never waits.
        sizes = _all_gather(torch.full((1,), V, dtype=torch.int64, device=targets.device), group_name)
        start, total = sizes[: dist.get_rank(_group(group_name))].sum(), sizes.sum()
    invalid = (targets < 0) | (targets >= total)
    codes = (targets - start).masked_fill_(invalid, INVALID).masked_fill_(targets == ignore_index, IGNORED)
    return codes, total


def gather_partials(partials: Tensor, group_name: str) -> Tensor:
    """Partial statistics of every rank's columns [R, 4, n], from this rank's [K, 4, n]."""
    return _all_gather(merge_partials(partials), group_name)


def sum_over_ranks(t: Tensor, group_name: str) -> None:
    """All-reduce t in place."""
    dist.all_reduce(t, group=_group(group_name))


def group_name(group: dist.ProcessGroup | None) -> str:
    """The name under which `group` can be found again; "" for none or for a group of one."""
    if group is None:
        return ""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"vocab_group must be a ProcessGroup or None, got {type(group).__name__}")
    return "" if group.size() == 1 else group.group_name


def _group(name: Any) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


def _all_gather(t: Tensor, name: str) -> Tensor:
    group = _group(name)
    out = t.new_empty((group.size() * t.shape[0], *t.shape[1:]))
    dist.all_gather_into_tensor(out, t.contiguous(), group=group)
    return out
