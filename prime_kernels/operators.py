"""Operators of torch, each from one declared signature.

The signature is a frozen dataclass: its fields are the operator's arguments, in order, with their types. The schema,
the implementation, the fake one and the derivative all follow from it, and none of them repeats the list.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from inspect import Parameter, Signature
from typing import Any, Generic, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

C = TypeVar("C")
Results = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Saved(Generic[C]):
    """What a backward has to go by."""

    context: Any  # torch's own
    options: C  # the call, without its tensors
    dtypes: Mapping[str, torch.dtype]  # of the call's tensors
    needs: Mapping[str, bool]  # which arguments want a gradient
    state: dict[str, Any]  # of this call's own, for as long as its graph lives

    @property
    def tensors(self) -> list[Any]:
        """Those that `keep` chose."""
        return list(self.context.saved_tensors)


@dataclass(frozen=True, slots=True)
class Derivative(Generic[C]):
    """How an operator is differentiated."""

    results: int  # so many of its leading results are differentiable
    keep: Callable[[C, Results], Sequence[Tensor | None]]  # tensors for backward, of arguments and results
    gradients: Callable[..., Mapping[str, Tensor]]  # (saved, *upstream) -> gradient of arguments, by name
    twice: bool = False  # `gradients` is differentiable torch itself


def register(
    name: str, signature: type[C], results: int, run: Callable[[C], Any], fake: Callable[[C], Any],
    derivative: Derivative[C] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """Register `prime_kernels::name`, a function of the fields of `signature` that returns `results` tensors, or one.

    Args:
        run: computes the results of a call.
        fake: makes tensors of the results' shapes and dtypes. Sizes may be symbols there: `t.shape[0]`, not `len(t)`,
            which would compile a graph for each number of tokens.
    """
    op = torch.library.custom_op(
        f"prime_kernels::{name}", lambda *values: run(signature(*values)), mutates_args=(),
        schema=_schema(signature, results),
    )  # fmt: skip
    op.register_fake(lambda *values: fake(signature(*values)))
    if derivative is not None:
        _register_derivative(op, name, signature, derivative)
    return op


def _schema(signature: type, results: int) -> str:
    hints = get_type_hints(signature)
    arguments = [
        Parameter(
            f.name, Parameter.POSITIONAL_OR_KEYWORD, annotation=hints[f.name],
            default=Parameter.empty if f.default is MISSING else f.default,
        )
        for f in fields(signature)
    ]  # fmt: skip

    def prototype() -> None: ...

    returned: Any = Tensor if results == 1 else tuple.__class_getitem__((Tensor,) * results)
    prototype.__signature__ = Signature(arguments, return_annotation=returned)  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, mutates_args=())


def _register_derivative(
    op: torch.library.CustomOpDef, name: str, signature: type[C], derivative: Derivative[C]
) -> None:
    names = [f.name for f in fields(signature)]  # type: ignore[arg-type]

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        output = (output,) if isinstance(output, Tensor) else output
        ctx.mark_non_differentiable(*output[derivative.results :])
        ctx.save_for_backward(*derivative.keep(signature(*inputs), output))
        ctx.options = tuple(None if isinstance(value, Tensor) else value for value in inputs)
        ctx.dtypes = {name: t.dtype for name, t in zip(names, inputs, strict=False) if isinstance(t, Tensor)}
        ctx.state = {}
        ctx.anchor = None if derivative.twice else anchor(inputs)

    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = upstream[: derivative.results]
        # Arguments that have their default are not always among the inputs.
        needs = dict(zip(names, ctx.needs_input_grad, strict=False))
        if all(t is None for t in upstream):
            return (None,) * len(needs)
        saved = Saved(ctx, signature(*ctx.options), ctx.dtypes, needs, ctx.state)
        if derivative.twice:
            found = dict(derivative.gradients(saved, *upstream))
        else:
            with torch.no_grad():
                found = dict(derivative.gradients(saved, *upstream))
            found = dict(zip(found, first_order(name, ctx.anchor, upstream, list(found.values())), strict=True))
        return tuple(found.get(name) if need else None for name, need in needs.items())

    op.register_autograd(backward, setup_context=setup_context)


def anchor(inputs: Sequence[Any]) -> Tensor | None:
    """Within a forward: a tensor of no numbers that stands in the graph of those inputs that want a gradient.

    It lets `first_order` refuse a derivative with respect to an input whose numbers nobody keeps.
    """
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    if not wanted or is_shape_only(*wanted):
        return None
    with torch.enable_grad():
        return _Anchor.apply(*wanted)


def first_order(
    name: str, anchor: Tensor | None, upstream: Sequence[Tensor | None], gradients: list[Tensor]
) -> list[Tensor]:
    """The gradients; where a graph of them is made, one that refuses a second derivative instead of missing it."""
    if not torch.is_grad_enabled() or anchor is None:
        return gradients
    return list(_FirstOrder.apply(name, len(upstream), anchor, *upstream, *gradients))


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        return inputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise AssertionError("an anchor's derivative is never asked for")


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, count: int, anchor: Tensor, *tensors: Tensor) -> Results:
        ctx.name = name
        return tuple(t.view_as(t) for t in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError(
            f"{ctx.name} has no second derivative: its gradient cannot be differentiated again; "
            "use prime_kernels.reference, which is plain torch"
        )


def is_shape_only(*tensors: Tensor) -> bool:
    """Whether any of these has a shape and no numbers: meta tensors, and those of a graph that is being traced."""
    return any(t.is_meta for t in tensors) or detect_fake_mode(list(tensors)) is not None


def own(t: Tensor, shape: torch.Size) -> Tensor:
    """A result [N] in a shape of N numbers, and no view: a module's hooks, such as FSDP2's, warn of views."""
    return t if t.shape == shape else t.view(shape).clone()
