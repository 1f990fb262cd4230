"""Supervised fine-tuning on demonstrations: the stage before PRIME."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from prime_kernels import LogProbHead

from . import optim
from .checkpoints import Progress
from .config import SFT, Config
from .data import Stream, demonstration_length, load_demonstrations
from .distributed import World
from .interrupt import Interrupts
from .models import LanguageModel
from .packing import Layout, micro_batches, pack_sequences
from .records import Sequences
from .rundir import RunDirectory
from .setup import layout_of, load_base, sft_directory
from .snapshot import save_model
from .view import View

GRAD_CLIP = 1.0
WARMUP = 0.1
"""Share of the steps over which the learning rate rises."""
CHECKPOINTS = 10
"""Over the whole stage."""


def train(config: Config, view: View, world: World) -> Path | None:
    """Makes the SFT model in `run.dir`/sft/model and returns that; None if interrupted, to be gone on with later.
    Collective."""
    directory = sft_directory(config)
    if world.first((directory / "config.json").exists):
        return directory
    model, tokenizer = load_base(config, world)
    optimizer = optim.adamw(model, lr=config.sft.lr)
    trained = {"model": (model, optimizer)}
    run = RunDirectory(config, directory.parent, world)
    progress = run.resume(trained)
    stream = Stream(
        load_demonstrations(config.sft.data, config.data, tokenizer), demonstration_length, seed=config.run.seed,
        max_tokens=config.data.max_prompt_tokens + config.rollout.max_tokens, position=progress.position,
        dropped=progress.too_long,
    )  # fmt: skip
    steps = config.sft.steps or math.ceil(config.sft.epochs * len(stream.items) / config.sft.batch)
    layout = layout_of(config, model, world)

    with Interrupts() as interrupts, view.bar("SFT", steps, progress.step) as advance:
        for step in range(progress.step + 1, steps + 1):
            began = time.perf_counter()
            examples = [example for chat in stream.take(config.sft.batch) for example in chat]
            sequences = pack_sequences(examples)
            set_learning_rate(optimizer, lr := learning_rate(config.sft, step, steps))
            done = optim.step(model, optimizer, losses(model, sequences, layout), grad_clip=GRAD_CLIP, world=world)
            seconds = time.perf_counter() - began
            rate = len(sequences.tokens) / seconds
            if not done.applied:
                kept = run.keep_nonfinite(step, sequences=sequences)
                view.warn(f"step {step}: {kept}")
            figures = {"loss": done.loss, "grad_norm": done.grad_norm, "lr": lr, "tokens_per_s": rate}
            run.log(step, {f"sft/{name}": value for name, value in figures.items()})
            advance(f"loss {done.loss:.3f}  {rate:.0f} tokens/s")
            progress = Progress(
                step=step, position=stream.position, too_long=stream.dropped, seconds=progress.seconds + seconds
            )
            if step % max(1, steps // CHECKPOINTS) == 0:
                run.checkpoints.save(progress, trained)
            if world.any(interrupts.requested):
                break
    run.finish(progress, trained)
    if progress.step < steps:
        return None
    save_model(model, tokenizer, directory, world)
    return directory


def losses(model: LanguageModel, sequences: Sequences, layout: Layout) -> Iterator[Tensor]:
    """−log p of the answers' tokens, each micro-batch's share of the mean over the batch."""
    T = int(sequences.cu_responses[-1])
    rows = torch.arange(len(sequences.cu_responses) - 1)
    for micro in micro_batches(sequences, rows, layout, model.device):
        yield model(micro, LogProbHead.token_loss, lambda logp, _: -logp / T).loss


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def learning_rate(config: SFT, step: int, steps: int) -> float:
    """Of step 1 … steps: linear to the peak over the warm-up, then a cosine to 0."""
    warm = WARMUP * steps
    if step <= warm:
        return config.lr * step / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm + 1)))
