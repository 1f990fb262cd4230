"""PRIME: reinforcement learning with process rewards from an implicit PRM that learns online from outcomes.

`train` is the algorithm (arXiv 2502.01456, algorithm 1) from top to bottom; each stage is a module of its own.
"""

import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from .algorithm import mismatch, policy, prm
from .algorithm.advantages import advantages, padded
from .algorithm.scoring import score
from .config.keys import Config
from .data.prompts import Stream, load_prompts, prompt_length
from .evaluation.accuracy import evaluate
from .models.distributed import World
from .models.language_model import LanguageModel
from .models.packing import pack
from .plan.flops import Tokens, stage_flops, tokens_of
from .plan.hardware import peak_flops
from .plan.sizes import sizes_of
from .records import Prompt
from .rollout.ahead import Ahead
from .rollout.collect import Collected, collect
from .rollout.engine import Engine
from .rollout.outcomes import Outcomes
from .rollout.sampler import LocalEngine
from .run.checkpoints import Progress, load_weights, progress_at
from .run.directory import CHECKPOINTS, RunDirectory
from .run.interrupt import Interrupted, Interrupts
from .run.saved import newest
from .run.setup import eos_tokens, load_models, load_policy
from .show import measures
from .show.view import View, step_summary, token_samples


def train(config: Config, view: View, world: World, interrupts: Interrupts) -> Progress:
    """Trains until `run.steps`, or until a stop is requested, and returns where it stands. Collective.

    Goes on from the newest checkpoint in `run.dir`, if there is one. All processes hold the same batch on the host and
    compute the same from it, each what models have to do with its share of it.
    """
    models = load_models(config, world)
    run = RunDirectory(config, config.run.dir, world, view.warn)
    progress = run.resume(models.trained)
    if world.any(interrupts.requested):
        return progress  # nothing has been done since that could be saved
    tokenizer, layout = models.tokenizer, models.layout
    stream = Stream(
        load_prompts(config.data, tokenizer, held_out=False), prompt_length, seed=config.run.seed,
        max_tokens=config.data.max_prompt_tokens, position=progress.position, dropped=progress.too_long,
    )  # fmt: skip
    held_out = held_out_prompts(config, tokenizer)
    relative_to = config.prm.reference if models.prm is not None else None
    step_pattern = config.prm.step_pattern if config.prm.granularity == "step" else None
    sizes = {name: sizes_of(model.transformer.config) for name, model in models.named.items()}
    peak = world.size * peak_flops(world.device, models.policy.compute_dtype)
    clock = measures.Clock(world)
    rollouts = world.apart()  # a batch may be sampled in a thread while this one trains

    def batch_of(step: int, check: Callable[[], None]) -> Collected:
        return collect(
            config.rollout, config.filter, stream, engine, outcomes, tokenizer, seed=seed_of(config, step),
            sampled=lambda _: check(),
        )  # fmt: skip

    def evaluation() -> measures.Figures:
        groups = evaluate(
            config.eval, config.rollout, held_out, engine, outcomes, tokenizer, sampled=lambda _: interrupts.check()
        )
        return measures.of_evaluation(*groups)

    with (
        rollout_engine(config, models.policy, tokenizer, rollouts) as engine,
        Outcomes(config.verify, rollouts) as outcomes,
        view.bar("PRIME", config.run.steps, progress.step) as advance,
        Ahead(batch_of, interrupts.check, ahead=config.rollout.ahead, last=config.run.steps) as batches,
    ):
        engine.refresh(progress.step)
        if not progress.evaluated:
            clock.step = progress.step + 1
            with suppress(Interrupted), clock("eval"):
                figures = evaluation()
                run.add(progress.step, figures)
                view.say(f"before step {progress.step + 1}: {measures.described(figures)}")
                progress = replace(progress, evaluated=True)

        for step in range(progress.step + 1, config.run.steps + 1):
            clock.step = step
            try:
                with clock("rollout"):
                    if world.any(interrupts.requested):
                        raise Interrupted
                    collected, lag = batches.take(step)
            except Interrupted:
                break
            engine.rest()
            figures = measures.of_rollouts(collected) | {"rollout/lag": lag}
            if len(collected.groups) < config.rollout.prompts:
                view.warn(f"step {step}: {measures.short_batch(collected, config.rollout.prompts)}")

            if collected.groups:
                batch = pack(collected.groups, tokenizer, step_pattern)
                batches.begin(step + 1)
                cu_seqlens = batch.sequences.cu_responses
                with clock("score"):
                    scores = score(
                        models.policy, models.reference, batch, layout, temperature=config.rollout.temperature,
                        relative_to=relative_to, kl=config.policy.kl_coef > 0,
                    )  # fmt: skip
                gap = mismatch.compare(batch.sampler_logp, scores.old, config.rollout.importance_clamp)
                figures |= measures.of_batch(batch, scores) | measures.of_mismatch(gap)
                if gap.alarm:
                    view.warn(f"step {step}: {gap.alarm}")

                rewards = process = carries = None
                if models.prm is not None and scores.reference is not None:
                    with clock("prm"):
                        rewards, learned = prm.reward_and_update(
                            config.prm, models.prm, models.prm_optimizer, batch, scores.reference, layout
                        )
                    figures |= measures.of_prm(config.prm.beta, batch, scores.reference, rewards, learned)
                    process, carries = (padded(t, cu_seqlens)[0] for t in prm.placed(config.prm, rewards, batch))

                with clock("policy"):
                    _, mask = padded(scores.old, cu_seqlens)
                    advantage = advantages(config.advantage, process, carries, batch.outcomes, mask, batch.groups)
                    updated = policy.update(
                        config.policy, models.policy, models.policy_optimizer, batch, scores, advantage.token[mask],
                        layout, importance=gap.importance, temperature=config.rollout.temperature,
                        max_tokens=config.rollout.max_tokens, seed=seed_of(config, step),
                    )  # fmt: skip
                figures |= measures.of_policy(advantage, updated)
                if figures["skipped/policy"] or figures.get("skipped/prm"):
                    kept = run.keep_nonfinite(step, batch=batch, scores=scores, rewards=rewards, advantages=advantage)
                    view.warn(f"step {step}: {kept}")

            with clock("rollout"):
                batches.settle()  # weights do not change under a batch that is being sampled
            with clock("refresh"):
                engine.refresh(step)
            last = step == config.run.steps
            evaluated = not (last or (config.eval.every and step % config.eval.every == 0))
            if not evaluated:
                if collected.groups:
                    samples = token_samples(collected.groups, rewards, cu_seqlens, tokenizer)
                    run.log_samples(step, samples)
                    view.samples(f"step {step}", samples)
                with suppress(Interrupted), clock("eval"):
                    figures |= evaluation()
                    evaluated = True
            trained = tokens_of(batch.sequences) if collected.groups else Tokens()
            figures |= clock.figures(trained.all, stage_flops(config, trained, **sizes), peak)
            progress = Progress(
                step=step, position=collected.position, too_long=collected.too_long, evaluated=evaluated,
                seconds=progress.seconds + figures["time/step"],
            )  # fmt: skip
            run.log(step, figures)
            advance(step_summary(figures))
            due = last or (config.run.checkpoint_every > 0 and step % config.run.checkpoint_every == 0)
            with clock("checkpoint"):
                run.save(progress, models.trained, due=due)

    with clock("checkpoint"):
        run.finish(progress, models.trained)
    return progress


def evaluate_newest(config: Config, world: World) -> tuple[int, measures.Figures]:
    """Accuracies of the newest checkpoint, or of the starting point where there is none, and its step. Collective."""
    model, tokenizer = load_policy(config, world)
    step, latest = 0, world.first(lambda: newest(config.run.dir / CHECKPOINTS))
    if latest:
        load_weights(latest, "policy", model, world)
        step = world.first(lambda: progress_at(latest)).step
    prompts = held_out_prompts(config, tokenizer)
    with rollout_engine(config, model, tokenizer, world) as engine, Outcomes(config.verify, world) as outcomes:
        engine.refresh(step)
        groups = evaluate(config.eval, config.rollout, prompts, engine, outcomes, tokenizer)
    return step, measures.of_evaluation(*groups)


def seed_of(config: Config, step: int) -> int:
    """Of the step's sampling and mini-batches."""
    return config.run.seed * 1_000_003 + step


def held_out_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The first `eval.prompts` ones that are not too long."""
    prompts = load_prompts(config.data, tokenizer, held_out=True)
    short = (p for p in map(prompts.__getitem__, range(len(prompts))) if len(p.tokens) <= config.data.max_prompt_tokens)
    return list(itertools.islice(short, config.eval.prompts))


def rollout_engine(config: Config, model: LanguageModel, tokenizer: PreTrainedTokenizerBase, world: World) -> Engine:
    eos = eos_tokens(tokenizer, model)
    if config.rollout.engine == "vllm":
        from .rollout.vllm.build import vllm_engine  # its HTTP client is for runs that have servers

        return vllm_engine(config, model, eos, world)
    return LocalEngine(model, eos=eos, cache_bytes=config.rollout.cache_gib * 2**30, world=world)
