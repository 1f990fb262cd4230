"""Bytes that the heads of `prime_kernels` take while they run, from the package's own plans of its tiles.

N response tokens, D hidden size, V vocabulary. On CUDA the strategy is "chunked" (a logit is one fp32 number), on a CPU
"torch" (three). A one-pass loss stores its gradients in fp32 until backward, which rounds them to 16 bits beside that.
"""

import torch

from prime_kernels.devices import CPU_FLOP_PER_BYTE, GPU_FLOP_PER_BYTE
from prime_kernels.plan import LOSS_NUMBERS, Tiling, plan_one_pass, plan_tiling
from prime_kernels.workspace import logprob_workspace, one_pass_workspace


def loss_bytes(N: int, D: int, V: int, *, dtype: torch.dtype, cuda: bool, trained: bool, together: bool) -> int:
    """The most that a one-pass loss holds: scratch, and the gradients that it stores.

    Args:
        trained: the head's weight gets a gradient.
        together: the loss needs all tokens' log-probs at once (prm.loss "dpo").
    """
    half, per_logit = dtype != torch.float32, 4 if cuda else 12
    copies = half and not cuda
    plan = plan_one_pass(
        N, D, V, workspace=one_pass_workspace(), bytes_per_logit=per_logit, copies=copies, need_dw=trained,
        flop_per_byte=GPU_FLOP_PER_BYTE if cuda else CPU_FLOP_PER_BYTE,
    )  # fmt: skip
    numbers = N * D + (V * D if trained else 0)
    stored, rounded = 4 * numbers, dtype.itemsize * numbers if half else 0
    if plan.passes == 1 and not (together and plan.rows < N):
        logits = plan.rows * V * per_logit
        if copies:  # of hidden states all the while, of the weight while the logits are still one tensor
            logits = max(logits, plan.rows * V * 4 + 4 * D * plan.cols) + 4 * D * plan.rows
        return stored + max(logits + plan.rows * 112 + N * 48, rounded)
    tiling = plan_tiling(
        N, D, V, workspace=one_pass_workspace(), bytes_per_logit=per_logit, half=False, copies=copies,
        per_token=LOSS_NUMBERS,
    )  # fmt: skip
    scratch = 4 * D * tiling.rows + _tile_bytes(tiling, N, D, per_logit, copies)
    return stored + max(scratch, rounded)


def logprob_bytes(N: int, D: int, V: int, *, dtype: torch.dtype, cuda: bool) -> int:
    """The most that a log-prob without gradients holds."""
    half, per_logit = dtype != torch.float32, 4 if cuda else 12
    copies = half and not cuda
    tiling = plan_tiling(N, D, V, workspace=logprob_workspace(), bytes_per_logit=per_logit, half=half, copies=copies)
    return _tile_bytes(tiling, N, D, per_logit, copies)


def _tile_bytes(tiling: Tiling, N: int, D: int, per_logit: int, copies: bool) -> int:
    """Of one tile's logits, copies of its operands, and statistics of all tokens."""
    tile = tiling.rows * tiling.cols * per_logit + tiling.rows * 112 + tiling.cols * 8 + N * 24
    return tile + (4 * D * (tiling.rows + tiling.cols) if copies else 0)
