"""From groups of responses to packed tensors, and from these to micro-batches of a bounded size."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .records import Batch, Group, MicroBatch, Sequences


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
    """How sequences are laid out for a model; bounds memory, does not change results."""

    budget: int
    """Tokens of a micro-batch, padding included."""
    packed: bool = False
    """One row of sequences, told apart by their position_ids, instead of a padded row for each."""


def micro_batches(
    sequences: Sequences, rows: Tensor, layout: Layout, device: torch.device, *, units: Tensor | None = None
) -> list[MicroBatch]:
    """Lays the given sequences out in micro-batches of a bounded size.

    Long sequences come first, so that those of a micro-batch are of like length and the first one shows the peak of
    memory. A sequence, or a unit, that is alone over the budget gets a micro-batch of its own.

    Args:
        rows: int64 [s] which sequences.
        units: int64 [S]: sequences of one number stay together (groups, where a loss compares their members).
    """
    lengths = sequences.cu_tokens.diff()
    unit_of = (torch.arange(len(lengths)) if units is None else units).tolist()
    members: dict[int, list[int]] = {}
    for row in rows.tolist():
        members.setdefault(unit_of[row], []).append(row)
    longest = {unit: int(lengths[found].max()) for unit, found in members.items()}
    made: list[list[int]] = []
    current: list[int] = []
    width = total = 0
    for unit in sorted(members, key=lambda unit: -longest[unit]):
        found = members[unit]
        width = max(width, longest[unit])
        total += int(lengths[found].sum())
        size = total if layout.packed else (len(current) + len(found)) * width
        if current and size > layout.budget:
            made.append(current)
            current, width, total = [], longest[unit], int(lengths[found].sum())
        current = [*current, *found]
    if current:
        made.append(current)
    return [_lay_out(sequences, torch.tensor(chosen), device, layout.packed) for chosen in made]


def _lay_out(sequences: Sequences, chosen: Tensor, device: torch.device, packed: bool) -> MicroBatch:
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
    cu_seqlens = torch.zeros(len(chosen) + 1, dtype=torch.int64)
    cu_seqlens[1:] = counts.cumsum(0)
    return MicroBatch(
        input_ids=input_ids.view(-1, width).to(device), position_ids=column[None].to(device) if packed else None,
        at=(place - 1).to(device), targets=targets.to(device), cu_seqlens=cu_seqlens, sequences=chosen,
        tokens=first[of] + index,
    )  # fmt: skip


def _ragged(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """For each element of rows of these lengths: its row, and its index in it."""
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    return row, torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]
