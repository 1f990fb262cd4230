"""One optimizer step that a non-finite loss or gradient cannot spoil."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .distributed import ALONE, World, whole
from .language_model import LanguageModel


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What became of one optimizer step."""

    loss: float
    grad_norm: float
    applied: bool
    """False where loss or gradient was not finite: then weights and optimizer are as before."""


def adamw(model: nn.Module, *, lr: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW with betas (0.9, 0.999), on parameters that are trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)


def step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, losses: Iterable[Tensor], *, grad_clip: float,
    world: World = ALONE,
) -> StepResult:  # fmt: skip
    """Sums the gradients of all processes' micro-batches' losses, clips their norm and applies them, if all is finite.

    Each loss is a micro-batch's share of the mini-batch's loss, normalised by counts of the whole mini-batch, so that
    the step does not depend on how the mini-batch was cut. Collective: every process gives equally many losses.
    """
    optimizer.zero_grad(set_to_none=True)
    mine = torch.zeros((), device=model.device)
    for loss in losses:
        loss.backward()
        mine += loss.detach()
    total = world.sum(mine.cpu())
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)).cpu()
    applied = bool(torch.isfinite(norm + total))
    if applied:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss=float(total), grad_norm=float(norm), applied=applied)
