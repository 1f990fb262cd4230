"""FLOPs against torch's counter, and by the passes that a configuration makes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from prime_train.config.keys import Config
from prime_train.plan.flops import Tokens, forward_flops, passes_of, stage_flops, training_flops
from prime_train.plan.sizes import sizes_of
from tests.support.shapes import qwen


def test_forward_flops_agree_with_torch_s_counter():
    architecture = qwen(64, 3, 500, tied=True)
    model = AutoModelForCausalLM.from_config(architecture, attn_implementation="eager")
    rows, width = 2, 128
    ids = torch.zeros(rows, width, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids).logits.sum()
    tokens = Tokens.of([width] * rows, responses=rows * width)
    # Eager attention computes what causality then masks.
    assert forward_flops(sizes_of(architecture), tokens, causal=False) == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    forward = forward_flops(sizes_of(architecture), tokens, causal=False)
    assert counter.get_total_flops() == pytest.approx(2 * forward, rel=0.02)
    causal = forward_flops(sizes_of(architecture), tokens)
    assert training_flops(sizes_of(architecture), tokens) == pytest.approx(3 * causal)


def test_stages_count_the_passes_that_the_configuration_makes():
    sizes, tokens = sizes_of(qwen(64, 2, 500, tied=True)), Tokens.of([10, 20], responses=12)
    once = forward_flops(sizes, tokens)

    def flops(**sections: dict) -> dict[str, float]:
        config = Config.model_validate(sections)
        return {stage: round(n / once) for stage, n in stage_flops(config, tokens, policy=sizes).items()}

    assert flops() == {"score": 2, "prm": 3, "policy": 3}
    assert flops(policy={"epochs": 2}, prm={"update": "before"}) == {"score": 2, "prm": 4, "policy": 6}
    assert flops(prm={"update": "none", "reference": "policy"}) == {"score": 1, "prm": 1, "policy": 3}
    assert flops(policy={"kl_coef": 0.1}, rollout={"temperature": 0.7})["score"] == 3
    assert flops(advantage={"process_coef": 0.0}) == {"score": 1, "policy": 3}
    assert passes_of(Config()).prm_trained == 1
