"""Log-probs of a batch's response tokens under a model, micro-batch by micro-batch."""

import torch
from torch import Tensor

from ..models.language_model import LanguageModel
from ..models.packing import Layout, micro_batches
from ..records import Batch, Scores, Sequences


@torch.no_grad()
def token_logp(
    model: LanguageModel, sequences: Sequences, layout: Layout, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs [T] of the response tokens, and the distributions' entropies [T], 0 unless asked for.

    Both are fp32, on the host; every process scores its share and has the whole. Collective.
    """
    T, S = int(sequences.cu_responses[-1]), len(sequences.cu_responses) - 1
    logp, entropies = torch.zeros(T), torch.zeros(T)
    for micro in micro_batches(sequences, torch.arange(S), layout, model.device):
        out = model(micro, temperature=temperature, entropy=entropy)
        logp[micro.tokens] = out.logp.cpu()
        if entropy:
            entropies[micro.tokens] = out.entropy.cpu()
    # Each token is scored by one process, and 0 on the others.
    logp, entropies = layout.world.sum(torch.stack([logp, entropies]))
    return logp, entropies


def score(
    policy: LanguageModel, reference: LanguageModel | None, batch: Batch, layout: Layout, *, temperature: float,
    relative_to: str | None, kl: bool,
) -> Scores:  # fmt: skip
    """Log-probs under the old policy and under what the PRM's rewards are relative to.

    The PRM and its reference are never scaled by a temperature; the policy is by that of sampling, and so is the
    reference of its KL term.

    Args:
        relative_to: "frozen" (the reference), "policy" (the old policy stands in for it), or None without a PRM.
    """
    sequences = batch.sequences
    old, entropy = token_logp(policy, sequences, layout, temperature=temperature, entropy=True)
    base = tempered = None
    if relative_to == "policy":
        base = old if temperature == 1 else token_logp(policy, sequences, layout)[0]
    if reference is not None:
        if relative_to == "frozen":
            base, _ = token_logp(reference, sequences, layout)
        if kl:
            same = relative_to == "frozen" and temperature == 1
            tempered = base if same else token_logp(reference, sequences, layout, temperature=temperature)[0]
    return Scores(old=old, entropy=entropy, reference=base, reference_tempered=tempered)
