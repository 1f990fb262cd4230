"""Rollouts from vLLM servers over HTTP: weights in, token ids and log-probs out.

    python examples/7_vllm_rollouts.py                          says how to start a server, and skips
    python examples/7_vllm_rollouts.py http://127.0.0.1:8001    or set VLLM_URL; several URLs share the prompts

`VLLMEngine` is what training samples from: it carries the policy's weights into the servers, and every response says
which weights it came from. The policy here is the model that the first server was started with, a directory or a name
that is at hand on this machine too. What vLLM says of its tokens is compared with this side's own log-probs.
"""

# ruff: noqa: E402  without a server nothing of what is imported after it is needed

import os
import sys

START = r"""
    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host 127.0.0.1 --port 8001 \
        --max-model-len 1024 --logprobs-mode processed_logprobs \
        --generation-config vllm --enable-scale-out
"""
urls = sys.argv[1:] or os.environ.get("VLLM_URL", "").split()
if not urls:
    print(f"skipped: no server. Start one\n{START}\nand give its URL: python {sys.argv[0]} http://127.0.0.1:8001")
    sys.exit()

import tempfile
from pathlib import Path

import httpx2
import torch
from transformers import AutoTokenizer

from prime_train.algorithm.scoring import token_logp
from prime_train.data.prompts import render
from prime_train.models.language_model import load_model
from prime_train.models.packing import Layout, pack_sequences
from prime_train.rollout.vllm.engine import VLLMEngine
from prime_train.rollout.vllm.transport import FileTransport
from prime_train.run.setup import eos_tokens, quiet_transformers

PROMPTS = ("17+5-3+4", "02-5+1+1")
SAMPLES, MAX_TOKENS = 2, 48

quiet_transformers()
try:
    served = httpx2.get(f"{urls[0]}/v1/models", trust_env=False).raise_for_status().json()
except httpx2.HTTPError as error:
    sys.exit(f"{urls[0]}: {error}")
name = served["data"][0]["id"]
tokenizer = AutoTokenizer.from_pretrained(name)
policy = load_model(name, dtype=torch.float32, attention="sdpa", trained=False)  # on the CPU: the server has the GPU
prompts = [render(tokenizer, [{"role": "user", "content": text}]) for text in PROMPTS]
eos = eos_tokens(tokenizer, policy)

with (
    tempfile.TemporaryDirectory() as directory,  # servers must see it by the same name
    VLLMEngine(policy, FileTransport(Path(directory)), eos=eos, deadline=120.0, urls=urls) as engine,
):
    engine.refresh(version=0)
    print(f"{', '.join(urls)}: serves this process's weights of {name}")
    groups = engine.sample(prompts, n=SAMPLES, temperature=1.0, max_tokens=MAX_TOKENS, seeds=[0, 1])

pairs = [(prompt, response.tokens) for prompt, group in zip(prompts, groups, strict=True) for response in group]
logp, _ = token_logp(policy, pack_sequences(pairs), Layout(budget=4096))
own = iter(logp.split([len(tokens) for _, tokens in pairs]))
for text, group in zip(PROMPTS, groups, strict=True):
    print(f"\nprompt {text!r}")
    for response in group:
        end = "ended by itself" if response.finished else "cut off"
        print(f"  {len(response.tokens)} tokens, {end}: {tokenizer.decode(list(response.tokens))!r}")
        print(f"  log-prob of each: {' '.join(f'{value:.2f}' for value in response.logp)}")
        print(f"  all of them {sum(response.logp):.3f}, under this side's model {next(own).sum():.3f}")
