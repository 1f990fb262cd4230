"""How much goes through a model at once while it generates: bounds that the sampler keeps and the plan counts with."""

PREFILL = 8192
"""Prompt tokens that go through the model together, or one prompt that has more: enough to fill a GPU, and what a
forward holds beside the cache does not grow with the prompts."""
CHOICE = 24
"""Bytes of each logit while tokens are drawn: it and its log-prob in fp32, probabilities and their sums in fp64."""
CHOICES = 1 << 28
"""Bytes that logits of rows among which tokens are drawn together may take so: rows take turns where they are many."""


def choice_rows(vocabulary: int) -> int:
    """Rows among whose logits tokens are drawn together."""
    return max(1, CHOICES // (CHOICE * vocabulary))
