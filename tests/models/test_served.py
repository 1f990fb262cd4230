"""Weights as servers get them are the weights that are saved, of any model, and can be told of before they are had."""

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig

from prime_train.models.language_model import LanguageModel, tiny_model
from prime_train.models.served import served_manifest, served_weights
from tests.support.tiny import TOKENIZER


def tied() -> LanguageModel:
    config = Qwen2Config(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    return LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def mixture_of_experts() -> LanguageModel:
    """transformers holds its experts as one tensor and saves them one by one."""
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, moe_intermediate_size=8, num_experts=4,
    )  # fmt: skip
    return LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


@pytest.mark.parametrize("make", [lambda: tiny_model("16x2x2", TOKENIZER, 0), tied, mixture_of_experts])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_served_weights_are_those_that_are_saved_in_the_precision_of_the_computation(tmp_path, make, dtype):
    net = make()
    net.compute_dtype = dtype
    net.transformer.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    served = list(served_weights(net))
    assert sorted(name for name, _ in served) == sorted(saved)
    assert all(torch.equal(tensor, saved[name].to(dtype)) for name, tensor in served)
    found = [(info.name, info.dtype, info.shape) for info in served_manifest(net)]
    assert found == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in served]


def test_a_sharded_models_served_weights_are_whole_and_its_manifest_gathers_nothing(monkeypatch):
    want = dict(served_weights(tiny_model("16x1x2", TOKENIZER, 0)))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        net = tiny_model("16x1x2", TOKENIZER, 0)
        fully_shard(net, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with monkeypatch.context() as patched:
            patched.setattr(torch.distributed.tensor.DTensor, "full_tensor", None)
            assert [info.name for info in served_manifest(net)] == list(want)
        served = dict(served_weights(net))
        assert all(type(tensor) is torch.Tensor and torch.equal(tensor, want[name]) for name, tensor in served.items())
    finally:
        torch.distributed.destroy_process_group()


def test_adapters_are_added_to_the_weights_that_they_adapt():
    peft = pytest.importorskip("peft")
    net, plain = (tiny_model("16x1x2", TOKENIZER, 0) for _ in range(2))
    target = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    peft.inject_adapter_in_model(target, net.transformer)
    layer = net.transformer.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    want = dict(served_weights(plain))
    name = "model.layers.0.self_attn.q_proj.weight"
    want[name] = want[name] + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    served = dict(served_weights(net))
    assert list(served) == list(want) == [info.name for info in served_manifest(net)]
    assert all(torch.allclose(served[key], want[key], atol=1e-6) for key in want)
    assert not any(tensor.requires_grad for tensor in served.values())
