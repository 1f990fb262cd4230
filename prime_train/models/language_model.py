"""Causal language models whose head computes log-probs and losses of response tokens, never logits of a batch."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from prime_kernels import LogProbHead

from ..records import MicroBatch

# Variants of a block that torch compiles before it goes on without compiling. The blocks of all models share one
# function, and each model has variants of its own: with gradients and without, for a first shape, for any, for one row.
RECOMPILE_LIMIT = 64


class LanguageModel(nn.Module):
    """A transformer of `transformers`, with a `LogProbHead` in its head's place.

    Weights in fp32 with a compute dtype of 16 bits are for `distributed.shard`, which makes their 16-bit copies.
    """

    def __init__(self, transformer: PreTrainedModel, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        _without_dropout(transformer)
        self.compute_dtype = compute_dtype
        transformer.lm_head = LogProbHead.from_linear(transformer.get_output_embeddings())
        self.transformer = transformer
        self.computes_on: torch.device | None = None
        """The device of the computation where weights live elsewhere, in host memory."""
        self.softcap: float | None = getattr(transformer.config, "final_logit_softcapping", None)

    def forward(
        self, micro: MicroBatch, op: Callable[..., Any] = LogProbHead.__call__, *args: Any, **options: Any
    ) -> Any:
        """`op(head, hidden, targets, ...)` of the micro-batch's response tokens: by default their log-probs [t].

        Padding stands on the right, where causal attention from real tokens does not reach it, so there is no mask.
        """
        backbone = self.transformer.get_decoder()
        packed = {} if micro.cu_tokens is None else _variable_lengths(micro.cu_tokens, micro.longest)
        out = backbone(input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False, **packed)
        hidden = out.last_hidden_state.flatten(0, 1)[micro.at]
        return op(self.transformer.lm_head, hidden, micro.targets, *args, softcap=self.softcap, **options)

    def next_token_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache
    ) -> Tensor:
        """fp32 logits [rows, V] after the last input token, for the sampler; the cache grows by the input."""
        out = self.transformer.get_decoder()(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        logits = self.transformer.lm_head(out.last_hidden_state[:, -1]).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's layers, in order."""
        return self.transformer.get_decoder().layers

    @property
    def device(self) -> torch.device:
        """Of the computation."""
        return self.computes_on or self.transformer.device

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def _variable_lengths(cu_tokens: Tensor, longest: int | None) -> dict[str, Any]:
    """`FlashAttentionKwargs` of `transformers`. Without all four of them flash attention finds out from position_ids
    what is packed, in every layer, and each time waits for the device; other implementations pass over them."""
    return {
        "cu_seq_lens_q": cu_tokens, "cu_seq_lens_k": cu_tokens, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def _without_dropout(transformer: PreTrainedModel) -> None:
    """Policy, PRM and reference are compared token by token: the same weights must give the same log-probs."""
    for module in transformer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def idle(model: LanguageModel, micro: MicroBatch) -> Tensor:
    """0, by a forward through all of the model, for a micro-batch that is empty while other processes have one."""
    loss: Tensor = model(micro, LogProbHead.token_loss, lambda logp, _: logp).loss
    return loss


def load_model(
    name: str, *, dtype: torch.dtype, attention: str, trained: bool, lora: int = 0, empty: bool = False
) -> LanguageModel:
    """A model from a directory or the hub that is to compute in dtype.

    One to be trained keeps its weights in fp32; any other is in dtype altogether, without gradients.

    Args:
        lora: rank of adapters (scaled by 2) that are then trained alone, on weights in dtype; 0 for none.
        empty: without storage, on the meta device; nothing but the configuration is read.
    """
    kept = torch.float32 if trained and not lora else dtype
    options: dict[str, Any] = {"dtype": kept, "attn_implementation": attention}
    if empty:
        with torch.device("meta"):
            transformer = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), **options)
        with contextlib.suppress(OSError):
            transformer.generation_config = GenerationConfig.from_pretrained(name)
    else:
        transformer = AutoModelForCausalLM.from_pretrained(name, **options)
    model = LanguageModel(transformer, dtype)
    model.requires_grad_(trained)
    if trained and lora:
        add_adapters(model, lora)
    return model.train(trained)


def add_adapters(model: LanguageModel, rank: int) -> None:
    """Low-rank adapters on every linear layer of the blocks (LoRA, arXiv 2106.09685), in fp32; all else is frozen.

    y = W·x + 2·B·A·x, with B = 0 at first. The head stays as it is, so its loss takes the frozen path.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, module in model.blocks.named_modules() if isinstance(module, nn.Linear)]
    found = {name.rpartition(".")[2] for name in linear}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same adapters at every start: a checkpoint replaces them, and runs can be repeated
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(found)), model.transformer
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def recompute_blocks(transformer: PreTrainedModel) -> None:
    """Each block keeps its input alone, and computes the rest again in backward."""
    # The second name is the older one, of which newer versions of transformers warn.
    enable = getattr(transformer, "activation_checkpointing_enable", None) or transformer.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def work_on_blocks(model: LanguageModel, how: Sequence[str]) -> None:
    """`model.blocks` of the configuration: Liger's kernels, recomputation in backward, compilation, in this order."""
    if "liger" in how:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        # Its losses would need logits.
        _apply_liger_kernel_to_instance(model.transformer, fused_linear_cross_entropy=False, cross_entropy=False)
    if "checkpoint" in how:
        recompute_blocks(model.transformer)
    if "compile" in how:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        for block in model.blocks:
            block.compile()


def tiny_model(
    shape: str, tokenizer: PreTrainedTokenizerBase, seed: int, compute_dtype: torch.dtype = torch.float32
) -> LanguageModel:
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
        return LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32), compute_dtype)


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
