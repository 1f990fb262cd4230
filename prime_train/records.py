"""What stages hand to each other: immutable, shapes in the fields.

S sequences (responses), T response tokens, P tokens with their prompts. Tokens of several sequences are packed, one
sequence after the other, and cut by cumulative lengths.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One problem, ready to be sampled from."""

    id: str
    text: str
    """As a person would read it; for verifiers and tables of samples."""
    tokens: tuple[int, ...]
    """The chat template's, up to where the response begins."""
    ability: str
    """What verifies it: "math", "code" or "arithmetic"."""
    reference: str
    """The right answer, or the tests of a program as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One sampled answer."""

    tokens: tuple[int, ...]
    """Through the first end-of-sequence token inclusive."""
    logp: tuple[float, ...]
    """Log-prob of each token under the sampler, at the sampling temperature; NaN where it is not known."""
    finished: bool
    """Ended by itself, not cut off at the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The K responses to one prompt, verified."""

    prompt: Prompt
    responses: tuple[Response, ...]
    texts: tuple[str, ...]
    outcomes: tuple[float, ...]
    """In [0, 1]."""

    @property
    def accuracy(self) -> float:
        return sum(self.outcomes) / len(self.outcomes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Packed prompts and responses, on the host."""

    tokens: Tensor
    """int64 [P]."""
    cu_tokens: Tensor
    """int64 [S + 1]: sequence s is tokens[cu_tokens[s]:cu_tokens[s + 1]]."""
    cu_responses: Tensor
    """int64 [S + 1]: the same of the T response tokens, which end each sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Everything that is known of a batch of rollouts before any model of the trainer has seen it; on the host."""

    sequences: Sequences
    outcomes: Tensor
    """fp32 [S] in [0, 1]."""
    groups: Tensor
    """int64 [S]: which prompt each sequence answers."""
    sampler_logp: Tensor
    """fp32 [T]; NaN where not known."""
    step_ends: Tensor
    """bool [T]: the last token of each reasoning step, by the pattern of the configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Some sequences of a batch, laid out for one forward, on the model's device."""

    input_ids: Tensor
    """int64 [rows, length], each row one sequence padded on the right, or one row of packed sequences."""
    position_ids: Tensor | None
    """int64 [1, length] for packed sequences, where it also tells them apart."""
    cu_tokens: Tensor | None
    """int32 [s + 1] for packed sequences: cuts their row, as variable-length attention wants to be told."""
    longest: int | None
    """Tokens of the longest of packed sequences; known to the host, so that attention does not wait for the device."""
    at: Tensor
    """int64 [t]: where, among the flattened input_ids, stands the token before each response token."""
    targets: Tensor
    """int64 [t]: the response tokens."""
    cu_seqlens: Tensor
    """int64 [s + 1], on the host: cuts the t response tokens into sequences."""
    sequences: Tensor
    """int64 [s], on the host: which sequences of the batch these are."""
    tokens: Tensor
    """int64 [t], on the host: which of the batch's T response tokens these are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Log-probs of the T response tokens, on the host, fp32."""

    old: Tensor
    """[T] of the policy that is about to be trained, at the sampling temperature."""
    entropy: Tensor
    """[T] of that policy, nats."""
    reference: Tensor | None
    """[T] of the PRM's reference; None without a PRM and a KL term."""
    reference_tempered: Tensor | None
    """[T] the reference at the sampling temperature, for the KL term; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRewards:
    """What the PRM says of a batch; on the host."""

    token: Tensor
    """fp32 [T]: β·(log π_prm − log π_ref)."""
    logits: Tensor
    """fp32 [S]: their sums as the rewards were taken."""
