"""A linear head that computes log-probs and losses inside its own forward."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .logprob import linear_logprob
from .ppo import linear_ppo_loss
from .prm import linear_prm_loss
from .token_loss import LossFn, linear_token_loss
from .types import PPOLoss, PRMLoss, TokenLoss


class LogProbHead(nn.Linear):
    """`nn.Linear` whose call with targets returns log-probs instead of logits.

        head(hidden)                       -> logits [..., V], as `nn.Linear`
        head(hidden, targets, ...)         -> TokenLogProbs, options as in `linear_logprob`
        head.token_loss(hidden, ...)       -> TokenLoss,     as `linear_token_loss` without weight and bias
        head.ppo_loss(hidden, ...)         -> PPOLoss,       as `linear_ppo_loss` …
        head.prm_loss(hidden, ...)         -> PRMLoss,       as `linear_prm_loss` …

    Every one of these runs in the module's forward, so that its hooks see it: FSDP2 (`fully_shard(head)`) gathers the
    weight for it and reduces its gradient, activation checkpointing recomputes it. Parameters and state_dict are those
    of `nn.Linear`; a tied embedding is tied as ever, `head.weight = embedding.weight`.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "LogProbHead":
        """A head on the parameters of an existing one, shared, not copied: `model.lm_head = from_linear(...)`."""
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta", dtype=linear.weight.dtype)
        head.weight = linear.weight
        head.bias = linear.bias
        head.train(linear.training)
        return head

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor | None = None, *args: Any, op: Callable[..., Any] = linear_logprob,
        **options: Any,
    ) -> Any:  # fmt: skip
        if targets is None:
            return super().forward(hidden)
        return op(hidden, self.weight, targets, *args, bias=self.bias, **options)

    def token_loss(
        self, hidden: Tensor, targets: Tensor, loss_fn: LossFn, inputs: Sequence[Tensor] = (), **options: Any
    ) -> TokenLoss:
        """`linear_token_loss` of this head."""
        return self(hidden, targets, loss_fn, inputs, op=linear_token_loss, **options)

    def ppo_loss(
        self, hidden: Tensor, targets: Tensor, old_logp: Tensor, advantages: Tensor, token_weight: Tensor,
        **options: Any,
    ) -> PPOLoss:  # fmt: skip
        """`linear_ppo_loss` of this head."""
        return self(hidden, targets, old_logp, advantages, token_weight, op=linear_ppo_loss, **options)

    def prm_loss(
        self, hidden: Tensor, targets: Tensor, ref_logp: Tensor, cu_seqlens: Tensor, outcomes: Tensor, **options: Any
    ) -> PRMLoss:  # fmt: skip
        """`linear_prm_loss` of this head."""
        return self(hidden, targets, ref_logp, cu_seqlens, outcomes, op=linear_prm_loss, **options)
