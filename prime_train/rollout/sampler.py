"""The embedded rollout engine: batched sampling with a key-value cache, from the trainer's own weights.

Each prompt has a seed of its own, and each of its responses numbers u_1, u_2, … in [0, 1) drawn from it; token t is the
one at which the cumulative probability exceeds u_t. So what is sampled does not depend on which prompts are sampled
together, nor on which process samples them, but for rounding of the probabilities.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from transformers import DynamicCache

from ..models import generation
from ..models.distributed import ALONE, World, gathered
from ..models.language_model import LanguageModel
from ..records import Response

GREEDY = 0.0
CHECK_EVERY = 8
"""Tokens between looks at which rows have ended: on a GPU each look waits for the device."""


class LocalEngine:
    """The `Engine` that samples from a `LanguageModel` on its device.

    Memory is bounded: as many responses are sampled together as `cache_bytes` of keys and values have room for, beside
    which one layer's keys are there again while its cache grows, `generation.PREFILL` prompt tokens go through the
    model at once and tokens are drawn within `generation.CHOICES` bytes. Rows that have ended are dropped from the
    cache. Every process samples from its share of the prompts; where the model is sharded, each holds all of its
    weights meanwhile.
    """

    def __init__(self, model: LanguageModel, *, eos: Sequence[int], cache_bytes: float, world: World = ALONE) -> None:
        self.model, self.world = model, world
        self.eos = torch.tensor(sorted(eos), device=model.device)
        self.cache_bytes = cache_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def refresh(self, version: int) -> None:
        """Nothing to do: the weights are the trainer's own."""

    def rest(self) -> None:
        """Nothing to do: a cache lives no longer than a call of `sample`."""

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], *, n: int, temperature: float, max_tokens: int, seeds: Sequence[int],
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> list[list[Response]]:  # fmt: skip
        """n responses to each prompt, of at most max_tokens tokens. Collective.

        Args:
            temperature: 0 takes the likeliest token, and then log-probs are those of temperature 1.
            seeds: of each prompt; the same seeds, prompts and weights give the same responses on the same device.
            progress: called with the number of tokens sampled since its last call.
        """

        def of_share(share: Sequence[tuple[Sequence[int], int]]) -> list[list[Response]]:
            return self._sample(share, n, temperature, max_tokens, progress)

        # Compiled blocks would be compiled anew for every length of the cache.
        with gathered(self.model), torch.compiler.set_stance("force_eager"):
            return self.world.spread(list(zip(prompts, seeds, strict=True)), of_share)

    def _sample(
        self, seeded: Sequence[tuple[Sequence[int], int]], n: int, temperature: float, max_tokens: int,
        progress: Callable[[int], None],
    ) -> list[list[Response]]:  # fmt: skip
        prompts = [prompt for prompt, _ in seeded]
        noise = [
            torch.rand(n, max_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for _, seed in seeded
        ]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        responses: list[list[Response]] = [[] for _ in prompts]
        training = self.model.training
        self.model.eval()
        try:
            at = 0
            while at < len(order):
                fit = max(1, self._rows_that_fit(len(prompts[order[at]]) + max_tokens))
                chosen = order[at : at + max(1, fit // n)]
                first = 0
                for copies in _split(n, fit):
                    drawn = torch.cat([noise[i][first : first + copies] for i in chosen])
                    sampled = self._sample_together(
                        [prompts[i] for i in chosen], copies, temperature, drawn.to(self.model.device), progress
                    )
                    first += copies
                    for j, i in enumerate(chosen):
                        responses[i] += sampled[j * copies : (j + 1) * copies]
                at += len(chosen)
        finally:
            self.model.train(training)
        return responses

    def _rows_that_fit(self, tokens: int) -> int:
        config = self.model.transformer.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
        return int(self.cache_bytes / (width * tokens * self.model.compute_dtype.itemsize))

    def _sample_together(
        self, prompts: list[Sequence[int]], n: int, temperature: float, noise: Tensor, progress: Callable[[int], None]
    ) -> list[Response]:
        """n responses to each prompt; noise [prompts × n, max_tokens] is uniform in [0, 1)."""
        max_tokens = noise.shape[1]
        device, width = self.model.device, max(map(len, prompts))
        ragged = min(map(len, prompts)) < width
        padding = torch.tensor([width - len(p) for p in prompts], device=device)
        padded = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        logits, cache = self._prefill(padded, padding, ragged, n)
        # Rows still going, in the cache's order: which response each is, and its prompt's padding.
        ids, padding = torch.arange(len(prompts) * n, device=device), padding.repeat_interleave(n)
        tokens = torch.full((len(ids), max_tokens), -1, device=device)
        logps = torch.zeros(len(ids), max_tokens, device=device)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=device)
        for step in range(max_tokens):
            chosen, logp = _choose(logits, temperature, noise[ids, step])
            logits = logits.new_empty(0)  # the next ones take their place
            tokens[ids, step], logps[ids, step] = torch.where(ended, -1, chosen), logp
            ended |= torch.isin(chosen, self.eos)
            if step == max_tokens - 1:
                break
            if step % CHECK_EVERY == CHECK_EVERY - 1:
                going = (~ended).nonzero().flatten()
                progress(CHECK_EVERY * len(ids))
                if len(going) == 0:
                    break
                if len(going) < len(ids):
                    cache.batch_select_indices(going)
                    ids, padding, chosen, ended = ids[going], padding[going], chosen[going], ended[going]
            logits = self._forward(chosen[:, None], padding, cache, ragged)
        return _responses(tokens.cpu(), logps.cpu(), self.eos.cpu())

    def _prefill(self, padded: Tensor, padding: Tensor, ragged: bool, n: int) -> tuple[Tensor, DynamicCache]:
        """Logits [prompts × n, V] after the prompts, and their cache: each prompt goes through the model once, then its
        cache serves all n responses."""
        rows = max(1, generation.PREFILL // padded.shape[1])
        logits: Tensor | None = None
        caches = []
        for at in range(0, len(padded), rows):
            caches.append(DynamicCache(config=self.model.transformer.config))
            found = self._forward(padded[at : at + rows], padding[at : at + rows], caches[-1], ragged)
            if logits is None:
                logits = found.new_empty(len(padded), n, found.shape[-1])
            logits[at : at + rows] = found[:, None]
            del found
        assert logits is not None
        cache = _joined(caches)
        if n > 1:
            cache.batch_repeat_interleave(n)
        return logits.flatten(0, 1), cache

    def _forward(self, input_ids: Tensor, padding: Tensor, cache: DynamicCache, ragged: bool) -> Tensor:
        """Logits [rows, V] after the last token; the cache grows by the input."""
        past = cache.get_seq_length()
        total = past + input_ids.shape[1]
        mask = positions = None
        if ragged:
            columns = torch.arange(total, device=input_ids.device)
            mask = (columns >= padding[:, None]).long()
            positions = (columns[past:] - padding[:, None]).clamp(min=0)
        return self.model.next_token_logits(input_ids, mask, positions, cache)


def _split(n: int, most: int) -> list[int]:
    """n as a sum of parts of at most `most`."""
    return [min(most, n - done) for done in range(0, n, most)]


def _joined(caches: list[DynamicCache]) -> DynamicCache:
    """The rows of all of them, layer by layer, so that one layer alone is there twice. The others are given up."""
    first = caches[0]
    if len(caches) > 1:
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            for name in ("keys", "values"):
                rows = torch.cat([getattr(layer, name) for layer in layers])
                for layer in layers:
                    setattr(layer, name, None)
                setattr(layers[0], name, rows)
                del rows
    return first


def _choose(logits: Tensor, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row and its log-prob; noise [rows] is uniform in [0, 1)."""
    rows = generation.choice_rows(logits.shape[-1])
    drawn = [_draw(*part, temperature) for part in zip(logits.split(rows), noise.split(rows), strict=True)]
    return torch.cat([chosen for chosen, _ in drawn]), torch.cat([logp for _, logp in drawn])


def _draw(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if temperature == GREEDY:
        logp = logits.log_softmax(-1)
        chosen = logits.argmax(-1)
    else:
        logp = (logits / temperature).log_softmax(-1)
        # In fp64: the sums must tell apart tokens far rarer than fp32's steps just below 1.
        cumulative = logp.double().exp_().cumsum(-1)
        above = torch.searchsorted(cumulative, (noise * cumulative[:, -1])[:, None], right=True)[:, 0]
        chosen = above.clamp(max=logits.shape[-1] - 1)
    return chosen, logp.gather(-1, chosen[:, None])[:, 0]


def _responses(tokens: Tensor, logps: Tensor, eos: Tensor) -> list[Response]:
    lengths = (tokens >= 0).sum(-1)
    finished = torch.isin(tokens.gather(-1, lengths[:, None] - 1)[:, 0], eos)
    return [
        Response(tokens=tuple(row[:length]), logp=tuple(logp[:length]), finished=end)
        for row, logp, length, end in zip(
            tokens.tolist(), logps.tolist(), lengths.tolist(), finished.tolist(), strict=True
        )
    ]
