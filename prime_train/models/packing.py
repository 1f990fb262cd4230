"""From groups of responses to packed tensors, and from these to micro-batches of a bounded size."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..records import Batch, Group, MicroBatch, Sequences
from .distributed import ALONE, World

BISECTIONS = 24
"""Of the cost of a micro-batch."""


def pack_sequences(pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Sequences:
    """Packs (prompt tokens, response tokens)."""
    tokens: list[int] = []
    cu_tokens, cu_responses = [0], [0]
    for prompt, response in pairs:
        tokens += prompt
        tokens += response
        cu_tokens.append(len(tokens))
        cu_responses.append(cu_responses[-1] + len(response))
    return Sequences(
        tokens=torch.tensor(tokens), cu_tokens=torch.tensor(cu_tokens), cu_responses=torch.tensor(cu_responses)
    )


def pack(groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase, step_pattern: str | None) -> Batch:
    """All responses of all groups, in order. Without a step pattern no token ends a step."""
    responses = [(group, response) for group in groups for response in group.responses]
    ends = [step_end_tokens(response.tokens, tokenizer, step_pattern) for _, response in responses]
    return Batch(
        sequences=pack_sequences((group.prompt.tokens, response.tokens) for group, response in responses),
        outcomes=torch.tensor([outcome for group in groups for outcome in group.outcomes]),
        groups=torch.arange(len(groups)).repeat_interleave(torch.tensor([len(g.responses) for g in groups])),
        sampler_logp=torch.tensor([logp for _, response in responses for logp in response.logp]),
        step_ends=torch.tensor([end for response in ends for end in response], dtype=torch.bool),
    )


def step_end_tokens(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, pattern: str | None) -> list[bool]:
    """Which tokens complete a match of the pattern in the response's text; the last token always ends a step."""
    if pattern is None:
        return [False] * len(tokens)
    pieces = tokenizer.batch_decode([[token] for token in tokens])
    stops = list(accumulate(map(len, pieces)))
    matches = [match.end() for match in re.finditer(pattern, "".join(pieces)) if match.end() > match.start()]
    ends = [False] * len(tokens)
    for at in matches:
        ends[next(i for i, stop in enumerate(stops) if stop >= at)] = True
    ends[-1] = True
    return ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How sequences are laid out for a model and over processes; bounds memory, does not change results."""

    budget: int
    """Tokens of a micro-batch, padding included."""
    packed: bool = False
    """One row of sequences, told apart by their position_ids, instead of a padded row for each."""
    pair_cost: float = 0.0
    """What attention from one token to another costs, relative to all else that a token costs."""
    world: World = ALONE
    """The processes that share the work."""

    def cost(self, lengths: Sequence[int]) -> float:
        """Of a micro-batch of sequences of these lengths; 1 is a token without its attention."""
        width = max(lengths, default=0)
        computed = lengths if self.packed else [width] * len(lengths)
        return sum(length + self.pair_cost * length**2 for length in computed)

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether sequences of these lengths are within the budget together."""
        return (sum(lengths) if self.packed else len(lengths) * max(lengths)) <= self.budget


def micro_batches(
    sequences: Sequences, rows: Tensor, layout: Layout, device: torch.device, *, units: Tensor | None = None
) -> list[MicroBatch]:
    """Lays the given sequences out in micro-batches of a bounded size, and returns this process's.

    Long sequences come first, so that those of a micro-batch are of like length and the first one shows the peak of
    memory. All processes get equally many, since each waits for the others in every one, and those that run at the same
    time cost about the same; where sequences do not suffice, some are empty: one token and no target. A sequence, or a
    unit, that is alone over the budget gets a micro-batch of its own.

    Args:
        rows: int64 [s] which sequences; the same on every process.
        units: int64 [S]: sequences of one number stay together (groups, where a loss compares their members).
    """
    lengths = sequences.cu_tokens.diff().tolist()
    unit_of = range(len(lengths)) if units is None else units.tolist()
    members: dict[int, list[int]] = {}
    for row in rows.tolist():
        members.setdefault(unit_of[row], []).append(row)
    longest_first = sorted(members.values(), key=lambda found: -max(lengths[row] for row in found))
    made = _evened(longest_first, lengths, layout)
    world = layout.world
    return [
        _lay_out(sequences, torch.tensor(chosen, dtype=torch.int64), device, layout.packed)
        for chosen in made[world.rank :: world.size]
    ]


def _evened(units: Sequence[list[int]], lengths: Sequence[int], layout: Layout) -> list[list[int]]:
    """Consecutive units in as few rounds of one micro-batch for each process as the budget allows, the costliest of
    them as cheap as it can be."""
    size = layout.world.size
    slots = -len(_cut(units, lengths, layout, float("inf"))) // size * -size
    low, high = 0.0, layout.cost([lengths[row] for unit in units for row in unit])
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if len(_cut(units, lengths, layout, middle)) <= slots else (middle, high)
    made = _cut(units, lengths, layout, high)
    return [*made, *([] for _ in range(slots - len(made)))]


def _cut(units: Sequence[list[int]], lengths: Sequence[int], layout: Layout, limit: float) -> list[list[int]]:
    """Units one after the other, a new micro-batch begun where the next one is over the budget or the cost's limit."""
    made: list[list[int]] = []
    current: list[int] = []
    for unit in units:
        together = [lengths[row] for row in (*current, *unit)]
        if current and not (layout.fits(together) and layout.cost(together) <= limit):
            made.append(current)
            current = []
        current = [*current, *unit]
    return [*made, current] if current else made


def _lay_out(sequences: Sequences, chosen: Tensor, device: torch.device, packed: bool) -> MicroBatch:
    if len(chosen) == 0:
        return _nothing(device, packed)
    starts, lengths = sequences.cu_tokens[chosen], sequences.cu_tokens.diff()[chosen]
    first, counts = sequences.cu_responses[chosen], sequences.cu_responses.diff()[chosen]
    row, column = _ragged(lengths)
    width = int(lengths.sum()) if packed else int(lengths.max())
    begins = lengths.cumsum(0) - lengths if packed else torch.arange(len(chosen)) * width
    input_ids = torch.zeros(width if packed else len(chosen) * width, dtype=torch.int64)
    tokens = sequences.tokens[starts[row] + column]
    input_ids[begins[row] + column] = tokens
    of, index = _ragged(counts)
    place = begins[of] + (lengths - counts)[of] + index  # of the response tokens themselves
    targets = input_ids[place]
    return MicroBatch(
        input_ids=input_ids.view(-1, width).to(device), position_ids=column[None].to(device) if packed else None,
        cu_tokens=_cuts(lengths).int().to(device) if packed else None, longest=int(lengths.max()) if packed else None,
        at=(place - 1).to(device), targets=targets.to(device), cu_seqlens=_cuts(counts), sequences=chosen,
        tokens=first[of] + index,
    )  # fmt: skip


def _cuts(lengths: Tensor) -> Tensor:
    """int64 [s + 1]: cumulative lengths from 0 on."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _nothing(device: torch.device, packed: bool) -> MicroBatch:
    """One token and no target: a forward and a backward that add nothing."""
    none, token = torch.zeros(0, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64, device=device)
    return MicroBatch(
        input_ids=token, position_ids=token if packed else None,
        cu_tokens=torch.tensor([0, 1], dtype=torch.int32, device=device) if packed else None,
        longest=1 if packed else None, at=none.to(device), targets=none.to(device), cu_seqlens=_cuts(none),
        sequences=none, tokens=none,
    )  # fmt: skip


def _ragged(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """For each element of rows of these lengths: its row, and its index in it."""
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    return row, torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]
