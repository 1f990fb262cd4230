"""Causal language models whose head computes log-probs and losses of response tokens, never logits of a batch."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

from prime_kernels import LogProbHead

from .records import MicroBatch


class LanguageModel(nn.Module):
    """A transformer of `transformers`, with a `LogProbHead` in its head's place."""

    def __init__(self, transformer: PreTrainedModel, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        _without_dropout(transformer)
        self.compute_dtype = compute_dtype
        transformer.lm_head = LogProbHead.from_linear(transformer.get_output_embeddings())
        self.transformer = transformer
        self.softcap: float | None = getattr(transformer.config, "final_logit_softcapping", None)

    def forward(
        self, micro: MicroBatch, op: Callable[..., Any] = LogProbHead.__call__, *args: Any, **options: Any
    ) -> Any:
        """`op(head, hidden, targets, ...)` of the micro-batch's response tokens: by default their log-probs [t].

        Padding stands on the right, where causal attention from real tokens does not reach it, so there is no mask.
        """
        with self._autocast():
            backbone = self.transformer.get_decoder()
            out = backbone(input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False)
            hidden = out.last_hidden_state.flatten(0, 1)[micro.at]
            return op(self.transformer.lm_head, hidden, micro.targets, *args, softcap=self.softcap, **options)

    def next_token_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache
    ) -> Tensor:
        """fp32 logits [rows, V] after the last input token, for the sampler; the cache grows by the input."""
        with self._autocast():
            out = self.transformer.get_decoder()(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
            logits = self.transformer.lm_head(out.last_hidden_state[:, -1]).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _autocast(self) -> torch.autocast:
        """Computes in 16 bits where the weights are kept in 32."""
        enabled = self.compute_dtype != next(self.parameters()).dtype
        return torch.autocast(self.device.type, self.compute_dtype, enabled=enabled)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def _without_dropout(transformer: PreTrainedModel) -> None:
    """Policy, PRM and reference are compared token by token: the same weights must give the same log-probs."""
    for module in transformer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def load_model(name: str, *, dtype: torch.dtype, device: torch.device, attention: str, trained: bool) -> LanguageModel:
    """A model from a directory or the hub that computes in dtype.

    One to be trained keeps its weights in fp32; any other is in dtype altogether, without gradients.
    """
    kept = torch.float32 if trained else dtype
    transformer = AutoModelForCausalLM.from_pretrained(name, dtype=kept, attn_implementation=attention)
    model = LanguageModel(transformer.to(device), dtype)  # type: ignore[arg-type]
    model.requires_grad_(trained)
    return model.train(trained)


def tiny_model(shape: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> LanguageModel:
    """Random weights of the Qwen2 architecture; shape is "hidden x layers x heads", such as "96x3x4"."""
    hidden, layers, heads = tiny_shape(shape)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=8 * hidden // 3, max_position_embeddings=1024,
        tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, initializer_range=0.06,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def tiny_shape(shape: str) -> tuple[int, int, int]:
    """hidden, layers, heads of "96x3x4"."""
    try:
        hidden, layers, heads = (int(part) for part in shape.split("x"))
    except ValueError:
        raise ValueError(
            f"a tiny model's shape must be hidden x layers x heads such as 96x3x4, got {shape!r}"
        ) from None
    if min(hidden, layers, heads) < 1 or hidden % (2 * heads):
        raise ValueError(f"a tiny model's hidden size must be a multiple of twice its heads, got {shape!r}")
    return hidden, layers, heads


def save_model(model: LanguageModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """In the format of `transformers`, tokenizer included; what is cut off in the middle leaves no such directory."""
    partial = directory.with_name(f"{directory.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    model.transformer.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(directory)
