"""Supervised fine-tuning on demonstrations: the stage before PRIME."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from prime_kernels import LogProbHead

from .config.keys import SFT, Config
from .data.prompts import Stream, demonstration_length, load_demonstrations
from .models import optim
from .models.distributed import World
from .models.language_model import LanguageModel
from .models.packing import Layout, micro_batches, pack_sequences
from .models.snapshot import save_model
from .plan.flops import tokens_of, training_flops
from .plan.hardware import peak_flops
from .plan.sizes import sizes_of
from .records import Sequences
from .run.checkpoints import Progress
from .run.directory import RunDirectory
from .run.interrupt import Interrupts
from .run.setup import layout_of, load_base, sft_directory
from .show.measures import Clock
from .show.view import View

GRAD_CLIP = 1.0
WARMUP = 0.1
"""Share of the steps over which the learning rate rises."""
CHECKPOINTS = 10
"""Over the whole stage."""


def train(config: Config, view: View, world: World, interrupts: Interrupts) -> Path | None:
    """Makes the SFT model in `run.dir`/sft/model and returns that; None if a stop is requested before its last step.
    Collective."""
    directory = sft_directory(config)
    if world.first((directory / "config.json").exists):
        return directory
    model, tokenizer = load_base(config, world)
    optimizer = optim.adamw(model, lr=config.sft.lr)
    trained = {"model": (model, optimizer)}
    run = RunDirectory(config, directory.parent, world, view.warn)
    progress = run.resume(trained)
    if world.any(interrupts.requested):
        return None  # nothing has been done since that could be saved
    stream = Stream(
        load_demonstrations(config.sft.data, config.data, tokenizer), demonstration_length, seed=config.run.seed,
        max_tokens=config.data.max_prompt_tokens + config.rollout.max_tokens, position=progress.position,
        dropped=progress.too_long,
    )  # fmt: skip
    steps = config.sft.steps or math.ceil(config.sft.epochs * len(stream.items) / config.sft.batch)
    layout = layout_of(config, model, world)
    sizes, peak = sizes_of(model.transformer.config), world.size * peak_flops(world.device, model.compute_dtype)
    clock = Clock(world)

    with view.bar("SFT", steps, progress.step) as advance:
        for step in range(progress.step + 1, steps + 1):
            clock.step = step
            with clock("sft"):
                examples = [example for chat in stream.take(config.sft.batch) for example in chat]
                sequences = pack_sequences(examples)
                set_learning_rate(optimizer, lr := learning_rate(config.sft, step, steps))
                done = optim.step(model, optimizer, losses(model, sequences, layout), grad_clip=GRAD_CLIP, world=world)
            if not done.applied:
                kept = run.keep_nonfinite(step, sequences=sequences)
                view.warn(f"step {step}: {kept}")
            figures = {"sft/loss": done.loss, "sft/grad_norm": done.grad_norm, "sft/lr": lr}
            tokens = tokens_of(sequences)
            figures |= clock.figures(tokens.all, {"sft": training_flops(sizes, tokens)}, peak)
            run.log(step, figures)
            advance(f"loss {done.loss:.3f}  {figures['throughput/tokens_per_s']:.0f} tokens/s")
            progress = Progress(
                step=step, position=stream.position, too_long=stream.dropped,
                seconds=progress.seconds + figures["time/step"],
            )  # fmt: skip
            with clock("checkpoint"):
                run.save(progress, trained, due=step % max(1, steps // CHECKPOINTS) == 0)
            if world.any(interrupts.requested):
                break
    with clock("checkpoint"):
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
