"""What a micro-batch holds beside weights, found by running the model's own class on tensors without storage.

A model of the configuration with its first two blocks runs forward and backward under FakeTensorMode, on tensors that
have shapes and lifetimes but no memory, while a dispatch mode keeps the sum of the storages that are alive. Nothing is
assumed of the architecture, except that the other blocks hold what the second one does.

At every operation the live bytes are an affine function of the number of tokens (sequences are of one width, so this
holds for attention that is quadratic in it, too), and up to the end of the last block's backward also of the number of
blocks. So two runs, of two and of three sequences, give them for any size: a peak is the upper envelope of lines.

What the heads of `prime_kernels` allocate while they run is not in here (see `head.py`), but the gradients that a
one-pass loss stores until backward are: their places in time are those of a stand-in.
"""

import json
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..models.language_model import recompute_blocks
from .records import Unplannable
from .sizes import blocks_of, build, config_key, config_of, shortened

BLOCKS = 2
"""Blocks of the model that is run."""
MASKLESS = "prime_train_maskless_sdpa"
"""Name of sdpa without a mask: for tensors without values `transformers` would make one, as it does not in training,
and with a mask keys and values are expanded to the heads of the queries."""

AttentionInterface.register(MASKLESS, sdpa_attention_forward)  # a name without a mask function gets no mask


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes as a function of tokens."""

    fixed: float
    per_token: float

    def __call__(self, tokens: int) -> int:
        return round(self.fixed + self.per_token * tokens)

    def __add__(self, other: "Line") -> "Line":
        return Line(self.fixed + other.fixed, self.per_token + other.per_token)

    def times(self, n: int) -> "Line":
        return Line(self.fixed * n, self.per_token * n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes beside weights, gradients of weights and the head's workspace, for micro-batches of one width."""

    held: Line
    """At the head of a training forward: inputs and all that is saved for backward."""
    backward: tuple[Line, ...]
    """From there to the end of backward, the largest of these. Includes the loss's stored gradients of hidden states
    and of the head's weight, and one weight's gradient at a time before it is added up or reduced."""
    scoring: tuple[Line, ...]
    """In a forward without gradients, the largest of these."""
    scored: Line
    """At the head of a forward without gradients."""

    def backward_peak(self, tokens: int) -> int:
        return max(line(tokens) for line in self.backward)

    def scoring_peak(self, tokens: int) -> int:
        return max(line(tokens) for line in self.scoring)


def count_activations(
    config: PretrainedConfig, *, dtype: torch.dtype, attention: str, width: int, checkpoint: bool, lora: int,
) -> Activations:  # fmt: skip
    """Counts them; each distinct call takes about a second, the same one again nothing.

    Args:
        dtype: of weights and hidden states in the computation.
        attention: `auto` and `flash_attention_2` count as `sdpa`, which saves the same: q, k, v, output, log-sum-exp.
        width: tokens of a sequence, padding included; matters to attention `eager` alone.
        checkpoint: blocks keep their inputs and are computed again in backward.
        lora: rank of adapters on the blocks' linear layers, which then train alone; 0 for none.

    Raises:
        Unplannable: the model needs the values of tensors to run, or does another number of operations for another
            number of sequences.
    """
    implementation = "eager" if attention == "eager" else MASKLESS
    return _count(config_key(config), dtype, implementation, width if attention == "eager" else 64, checkpoint, lora)


@cache
def _count(key: str, dtype: torch.dtype, attention: str, width: int, checkpoint: bool, lora: int) -> Activations:
    config = config_of(key)
    layers = json.loads(key).get("num_hidden_layers") or config.get_text_config().num_hidden_layers
    short = shortened(config, min(BLOCKS, layers))
    try:
        with FakeTensorMode():
            model = build(short, dtype=dtype, attention=attention)
            if lora:
                model.requires_grad_(False)
                _adapt(blocks_of(model), lora)
            if checkpoint:
                recompute_blocks(model)
            trained = [_train(model.train(), rows, width) for rows in (2, 3)]
            scored = [_score(model.eval(), rows, width) for rows in (2, 3)]
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise Unplannable(f"{config.model_type}: {str(error).splitlines()[0]}") from error
    others = layers - len(trained[0].blocks)
    lines = _lines([run.curve for run in trained], width)
    ends = [lines[at] for at in trained[0].blocks]
    each = (_difference(*ends[-2:]) if len(ends) > 1 else Line(0, 0)).times(others)
    # Once the gradient has left the second block, all later ones have given up what they held.
    until = trained[0].first_block if len(ends) > 1 else len(lines)
    backward = [line + each for line in lines[trained[0].head : until]] + lines[until:]
    forward = _lines([run.curve for run in scored], width)
    return Activations(
        held=lines[trained[0].head] + each, backward=_envelope(backward), scoring=_envelope(forward),
        scored=forward[scored[0].head],
    )  # fmt: skip


@dataclass(slots=True)
class _Run:
    """Live bytes after every operation, and where in this list things happened."""

    curve: list[int]
    blocks: list[int]
    """Ends of the blocks' forwards."""
    head: int = 0
    """Where the head begins."""
    first_block: int = 0
    """Where the gradient of the first block's output is there."""


class _Live(TorchDispatchMode):
    """Keeps the sum of the bytes of storages that operations made and that are still referred to."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.curve: list[int] = [0]
        self._seen: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        for t in known:
            self._seen[t.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (storage := t.untyped_storage()) not in self._seen:
                self._seen[storage] = None
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.curve.append(self.now)
        return out

    def _freed(self, nbytes: int) -> None:
        self.now -= nbytes

    @property
    def at(self) -> int:
        return len(self.curve) - 1


class _Stored(torch.autograd.Function):
    """Stands in for a one-pass loss: its gradients are there when its forward ends, and leave in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.stored = torch.empty_like(hidden), torch.empty_like(weight) if weight.requires_grad else None
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor | None]:
        stored, ctx.stored = ctx.stored, None
        return stored


def _train(model: PreTrainedModel, rows: int, width: int) -> _Run:
    dropped = [p.register_post_accumulate_grad_hook(_drop) for p in model.parameters() if p.requires_grad]
    with _Live([*model.parameters(), *model.buffers()]) as live:
        run = _Run(live.curve, [])
        hooks = [block.register_forward_hook(_marker(live, run)) for block in blocks_of(model)]
        micro = _micro_batch(rows, width)
        hidden = _hidden(model, micro)
        run.head = live.at
        loss = _Stored.apply(hidden, model.get_output_embeddings().weight)
        del hidden
        loss.backward()
        del micro
    for hook in (*dropped, *hooks):
        hook.remove()
    return run


@torch.no_grad()
def _score(model: PreTrainedModel, rows: int, width: int) -> _Run:
    with _Live([*model.parameters(), *model.buffers()]) as live:
        micro = _micro_batch(rows, width)
        hidden = _hidden(model, micro)
        run = _Run(live.curve, [], head=live.at)
        del micro, hidden
    return run


def _micro_batch(rows: int, width: int) -> tuple[Tensor, ...]:
    """input_ids, indices of response tokens (here of all), targets, and the four fp32 numbers a token of a loss."""
    n = rows * width
    ids, at, targets = (torch.zeros(shape, dtype=torch.int64) for shape in ((rows, width), (n,), (n,)))
    return ids, at, targets, torch.zeros(n, 4)


def _hidden(model: PreTrainedModel, micro: tuple[Tensor, ...]) -> Tensor:
    """What the head gets."""
    out = model.get_decoder()(input_ids=micro[0], use_cache=False)
    return out.last_hidden_state.flatten(0, 1)[micro[1]]


def _marker(live: _Live, run: _Run) -> Callable[..., None]:
    def mark(module: nn.Module, inputs: Any, output: Any) -> None:
        if len(run.blocks) == BLOCKS:
            return  # computed again in backward
        run.blocks.append(live.at)
        if len(run.blocks) == 1:
            hidden = output[0] if isinstance(output, tuple) else output

            def arrived(gradient: Tensor) -> None:
                run.first_block = live.at

            hidden.register_hook(arrived)

    return mark


def _drop(parameter: Tensor) -> None:
    """Gradients of weights are counted apart: they are added up in place, or reduced and sharded at once."""
    parameter.grad = None


class _Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.b = nn.Parameter(base.weight.new_empty(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * nn.functional.linear(nn.functional.linear(x, self.a), self.b)


def _adapt(blocks: nn.ModuleList, rank: int) -> None:
    for parent in list(blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, _Adapted(child, rank))


def _lines(curves: list[list[int]], width: int) -> list[Line]:
    """The line through the live bytes of two and of three sequences, at every operation."""
    two, three = curves
    if len(two) != len(three):
        raise RuntimeError("another number of operations for another number of sequences")
    return [Line(3 * a - 2 * b, (b - a) / width) for a, b in zip(two, three, strict=True)]


def _difference(before: Line, after: Line) -> Line:
    return Line(after.fixed - before.fixed, after.per_token - before.per_token)


def _envelope(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Those of the lines that are the highest one somewhere on tokens ≥ 0, by growing slope."""
    best: dict[float, float] = {}
    for line in lines:
        best[line.per_token] = max(line.fixed, best.get(line.per_token, line.fixed))
    hull: list[Line] = []
    for slope in sorted(best):
        line = Line(best[slope], slope)
        while hull and (hull[-1].fixed <= line.fixed or (len(hull) > 1 and _meet(*hull[-2:]) >= _meet(hull[-1], line))):
            hull.pop()
        hull.append(line)
    assert all(a.fixed > b.fixed for a, b in pairwise(hull))
    return tuple(hull)


def _meet(flat: Line, steep: Line) -> float:
    """Tokens from which on the steeper line is the higher."""
    return (flat.fixed - steep.fixed) / (steep.per_token - flat.per_token)
