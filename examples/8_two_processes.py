"""The same batch on one process and on two: the same loss, the same gradients.

    python examples/8_two_processes.py
    torchrun --standalone --nproc-per-node 2 examples/8_two_processes.py

The first command starts the second. Each process computes a PPO loss of ragged responses twice: alone, with all of
the model, and together with the other one, where each holds half of every weight (FSDP2) and half of the responses.
Losses are divided by the number of tokens of the whole batch, so nothing depends on how it was shared out.
"""

# ruff: noqa: E402  the process that starts the others needs nothing of what is imported after it

import os
import subprocess
import sys

PROCESSES = 2
if "RANK" not in os.environ:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    sys.exit(subprocess.call([*torchrun, __file__], env={"OMP_NUM_THREADS": "1", **os.environ}))

import random

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from prime_kernels import LogProbHead
from prime_train.data import arithmetic
from prime_train.models.distributed import ALONE, joined, shard, whole
from prime_train.models.language_model import LanguageModel, idle, tiny_model
from prime_train.models.packing import Layout, micro_batches, pack_sequences

S = 13  # responses: an odd number, so that they cannot be shared out evenly

tokenizer = arithmetic.tokenizer()
rng = random.Random(0)  # the same numbers on every process


def text(length: int) -> list[int]:
    return [rng.randrange(5, len(tokenizer)) for _ in range(length)]


sequences = pack_sequences([(text(rng.randint(4, 12)), text(rng.randint(1, 40))) for _ in range(S)])
T = int(sequences.cu_responses[-1])
generator = torch.Generator().manual_seed(0)
old_logp = -3 + 0.3 * torch.randn(T, generator=generator)
advantages = torch.randn(T, generator=generator)
token_weight = torch.full((T,), 1 / T)


def loss_and_gradients(model: LanguageModel, layout: Layout) -> tuple[float, dict[str, Tensor], int]:
    """Of the whole batch, and how many tokens this process had to do with."""
    loss, tokens = torch.zeros(()), 0
    for micro in micro_batches(sequences, torch.arange(S), layout, model.device):
        if len(micro.sequences):
            given = (t[micro.tokens].to(model.device) for t in (old_logp, advantages, token_weight))
            share = model(micro, LogProbHead.ppo_loss, *given).loss
        else:
            share = idle(model, micro)  # the other process waits for this one in every forward and backward
        share.backward()
        loss += share.detach().cpu()
        tokens += len(micro.tokens)
    gradients = {name: whole(p.grad).cpu() for name, p in model.named_parameters() if p.grad is not None}
    return float(layout.world.sum(loss)), gradients, tokens


on_gpus = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
with joined(torch.device("cuda" if on_gpus else "cpu"), replicas=1, patience=60.0, sharded=True) as world:
    alone = tiny_model("64x2x4", tokenizer, seed=0).to(world.device)
    together = shard(tiny_model("64x2x4", tokenizer, seed=0).to(world.device), world)

    one_loss, one, _ = loss_and_gradients(alone, Layout(budget=128, world=ALONE))
    loss, found, tokens = loss_and_gradients(together, Layout(budget=128, world=world))

    local = sum(p.to_local().numel() for p in together.parameters() if isinstance(p, DTensor))
    told = world.each(lambda: f"{tokens} of {T} response tokens, {local:,} of {alone.parameter_count():,} weights")
    if world.leads:
        for rank, said in enumerate(told):
            print(f"process {rank} of {world.size}: {said}")
        print(f"loss on one process   {one_loss:.9f}")
        print(f"loss on {world.size} processes   {loss:.9f}")
        error = {name: float((found[name] - one[name]).norm() / one[name].norm()) for name in one}
        worst = max(error, key=lambda name: error[name])
        print(f"gradients of {len(error)} tensors agree within {error[worst]:.0e} of their norm; the farthest apart is")
        print(f"  {worst}")
        if error[worst] > 1e-5 or abs(loss - one_loss) > 1e-6 or found.keys() != one.keys():
            sys.exit("one process and several do not agree")
