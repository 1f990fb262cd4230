"""A linear head that computes log-probs and losses inside its own forward."""

import copy
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from .logprob import linear_logprob
from .ppo import linear_ppo_loss
from .prm import linear_prm_loss
from .token_loss import LossFn, linear_token_loss
from .types import PPOLoss, PRMLoss, TokenLoss


class _Bound:
    """Arguments that pass a module's hooks unseen: FSDP2 casts every floating-point tensor that it finds.

    No dataclass, for it looks into those.
    """

    def __init__(self, args: tuple, options: dict[str, Any]) -> None:
        self.args, self.options = args, options


def _unbound(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A head's `forward` that is given what was bound; what a hook has added stands beside it."""

    @wraps(forward)
    def unbinding(self: nn.Module, *args: Any, bound: _Bound | None = None, **options: Any) -> Any:
        if bound is not None:
            args, options = (*args, *bound.args), {**bound.options, **options}
        return forward(self, *args, **options)

    unbinding.unbinds = True  # type: ignore[attr-defined]
    return unbinding


def _unbinds(forward: Callable[..., Any]) -> bool:
    return getattr(forward, "unbinds", False)


def _is_sharded(head: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(head).__mro__)


class LogProbHead(nn.Linear):
    """`nn.Linear` whose call with targets returns log-probs instead of logits.

        head(hidden)                       -> logits [..., V], as `nn.Linear`
        head(hidden, targets, ...)         -> TokenLogProbs, options as in `linear_logprob`
        head.token_loss(hidden, ...)       -> TokenLoss,     as `linear_token_loss` without weight and bias
        head.ppo_loss(hidden, ...)         -> PPOLoss,       as `linear_ppo_loss` …
        head.prm_loss(hidden, ...)         -> PRMLoss,       as `linear_prm_loss` …

    Every one of these runs in the module's forward, so that its hooks see it: FSDP2 (`fully_shard(head)`) gathers the
    weight for it and reduces its gradient, activation checkpointing recomputes it. Of the arguments, hooks see hidden
    states and targets alone, so that FSDP2's mixed precision casts no log-prob, advantage or temperature; a module
    around the head that is given them has its own arguments cast, unless `cast_forward_inputs=False`. Parameters and
    state_dict are those of `nn.Linear`; a tied embedding is tied as ever, `head.weight = embedding.weight`.

    A plain `nn.Linear` that is put in a head's place (`model.lm_head = …`, as `resize_token_embeddings` of transformers
    does) becomes that head, its class, hooks and attributes, on the new layer's parameters. Delete the attribute first
    to be rid of the head.

    A subclass may have a `forward` of its own, `(self, hidden, targets=None, ...)` with any of the options by name.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        _keep_heads()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not _unbinds(cls.forward):  # its own, or a mixin's
            cls.forward = _unbound(cls.forward)  # type: ignore[method-assign]

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "LogProbHead":
        """A head on the parameters of an existing one, shared, not copied: `model.lm_head = from_linear(...)`.

        Raises:
            TypeError: the layer computes something else than `nn.Linear` does, such as one with LoRA adapters or
                quantised weights, or it has hooks, all of which the head would leave out.
        """
        if not _computes_linear(linear):
            raise TypeError(
                f"from_linear takes a layer that computes what nn.Linear does, got {type(linear).__module__}."
                f"{type(linear).__name__}: merge its adapters, dequantise it, or make weight and bias parameters first"
            )
        if _has_hooks(linear):
            raise TypeError(
                "from_linear takes a layer without hooks, which the head would leave out: remove them first and "
                "register them on the head"
            )
        return _on_parameters(cls(1, 1, bias=False, device="meta", dtype=linear.weight.dtype), linear)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _keep_heads()

    def __call__(self, hidden: Any = None, targets: Tensor | None = None, *args: Any, **options: Any) -> Any:
        if hidden is None:
            hidden = options.pop("input", None)  # as nn.Linear has it
        if hidden is None:
            raise TypeError("LogProbHead must be given hidden states, got None")
        if targets is None and not args and not options:
            return super().__call__(hidden)
        if not _unbinds(self.forward) and not _is_sharded(self):  # somebody has put another one in its place
            return super().__call__(hidden, targets, *args, **options)
        return super().__call__(hidden, targets, bound=_Bound(args, options))

    @_unbound
    def forward(self, hidden: Tensor, targets: Tensor | None = None, *args: Any, **options: Any) -> Any:
        op: Callable[..., Any] = options.pop("op", linear_logprob)
        if targets is None:
            if args or options:
                raise TypeError(f"LogProbHead needs targets where it is given {', '.join(options) or 'more'}")
            return super().forward(hidden)
        return op(hidden, self.weight, targets, *args, bias=self.bias, **options)

    def token_loss(
        self, hidden: Tensor, targets: Tensor, loss_fn: LossFn, inputs: Sequence[Tensor] = (), **options: Any
    ) -> TokenLoss:
        """`linear_token_loss` of this head."""
        return self(hidden, targets, op=linear_token_loss, loss_fn=loss_fn, inputs=inputs, **options)

    def ppo_loss(
        self, hidden: Tensor, targets: Tensor, old_logp: Tensor, advantages: Tensor, token_weight: Tensor,
        **options: Any,
    ) -> PPOLoss:  # fmt: skip
        """`linear_ppo_loss` of this head."""
        return self(
            hidden, targets, op=linear_ppo_loss, old_logp=old_logp, advantages=advantages, token_weight=token_weight,
            **options,
        )  # fmt: skip

    def prm_loss(
        self, hidden: Tensor, targets: Tensor, ref_logp: Tensor, cu_seqlens: Tensor, outcomes: Tensor, **options: Any
    ) -> PRMLoss:  # fmt: skip
        """`linear_prm_loss` of this head."""
        return self(
            hidden, targets, op=linear_prm_loss, ref_logp=ref_logp, cu_seqlens=cu_seqlens, outcomes=outcomes, **options
        )  # fmt: skip


_hook: Any = None


def _keep_heads() -> None:
    """From the first head on, a plain linear layer that takes a head's place becomes one."""
    global _hook
    if _hook is None:
        _hook = register_module_module_registration_hook(_replacement)  # type: ignore[arg-type]


def _computes_linear(layer: nn.Module) -> bool:
    """Whether a layer does what `nn.Linear` does with a weight of its own, but for its hooks."""
    if not isinstance(layer, nn.Linear) or "forward" in vars(layer) or not _has_parameters(layer):
        return False
    kind = type(layer)
    return any(kind.forward is of.forward and kind.__call__ is of.__call__ for of in (nn.Linear, LogProbHead))


def _has_parameters(layer: nn.Module) -> bool:
    """Whether weight and bias are parameters, not what pruning, a parametrisation or a buffer makes them."""
    return {"weight", "bias"} <= layer._parameters.keys()


def _has_hooks(layer: nn.Module) -> bool:
    return any(hooks for name, hooks in vars(layer).items() if name.endswith("_hooks"))


def _on_parameters(head: "LogProbHead", linear: nn.Linear) -> "LogProbHead":
    """The head with the parameters of a layer in place of its own."""
    head._parameters = {**head._parameters, **linear._parameters}
    head.out_features, head.in_features = linear.weight.shape
    head.train(linear.training)
    return head


def _replacement(parent: nn.Module, name: str, module: nn.Module | None) -> nn.Module | None:
    head = parent._modules.get(name)
    if not isinstance(head, LogProbHead) or type(module) is not nn.Linear:
        return None
    if not _computes_linear(module) or _has_hooks(module):
        return None
    if _is_sharded(head):
        raise TypeError(f"{name} is a LogProbHead that FSDP2 shards already: replace its layer before fully_shard")
    if not _has_parameters(head):
        raise TypeError(f"{name} is a LogProbHead whose weight is made of others: remove its parametrisation first")
    # A copy: whoever holds the old head keeps it as it is.
    new = copy.copy(head)
    vars(new).update({key: copy.copy(value) for key, value in vars(new).items() if isinstance(value, dict)})
    return _on_parameters(new, module)
