"""Shapes that the tests of plans, FLOPs and measures share."""

from typing import Any

from transformers import Qwen2Config

from prime_train.config.keys import Config
from prime_train.config.settings import load_config

BIG: dict[str, Any] = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
       "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}  # fmt: skip
"""Of Qwen2.5-7B."""


SHAPES = {
    "qwen2.5-0.5b-gsm8k": {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                           "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2.5-1.5b-gsm8k": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
                           "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
                           "tie_word_embeddings": True},
    "eurus-2-7b": BIG,
}  # fmt: skip
"""Of the models of shipped recipes."""


def qwen(hidden: int, layers: int, vocabulary: int, *, tied: bool) -> Qwen2Config:
    """Grouped queries and an MLP of three times the width, as real models have them."""
    return Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=3 * hidden, tie_word_embeddings=tied,
    )  # fmt: skip


def shipped(name: str, *words: str) -> Config:
    """A configuration of the package, with keys as on the command line."""
    return load_config(name, words)
