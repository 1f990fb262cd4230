"""Which linear layers become heads: those that are asked for, and those that take a head's place."""

import pytest
import torch
import torch.nn.utils.prune
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from prime_kernels import LogProbHead, linear_logprob
from tests.kernels.test_head import Cooler, D, Model, N, V
from tests.support.oracle import F32, make_inputs


def test_a_head_made_of_a_linear_layer_shares_its_parameters():
    linear = nn.Linear(D, V, bias=False)
    head = LogProbHead.from_linear(linear)
    assert head.weight is linear.weight
    assert head.bias is None
    assert isinstance(head, nn.Linear)
    assert (head.in_features, head.out_features) == (D, V)


class Scaled(nn.Linear):
    """Computes something else than its base."""

    def forward(self, input):
        return 2 * super().forward(input)


def lora_layer():
    model = get_peft_model(nn.Sequential(nn.Linear(D, V)), LoraConfig(target_modules=["0"]))
    return model.base_model.model[0]


def patched_layer():
    linear = nn.Linear(D, V)
    setattr(linear, "forward", lambda x: x)  # noqa: B010, as offloading hooks do
    return linear


class Called(nn.Linear):
    """As `Scaled`, by the call."""

    def __call__(self, input):
        return 2 * super().__call__(input)


@pytest.mark.parametrize(
    "layer", [lora_layer, patched_layer, lambda: Scaled(D, V), lambda: Called(D, V), lambda: nn.Embedding(V, D)],
    ids=["adapters", "patched", "subclass", "called", "embedding"],
)  # fmt: skip
def test_a_layer_that_computes_something_else_is_refused(layer):
    with pytest.raises(TypeError, match=r"from_linear takes a layer that computes what nn.Linear does, got \S+: merge"):
        LogProbHead.from_linear(layer())


def with_bias_buffer(layer):
    bias = layer.bias.detach()
    del layer.bias
    layer.register_buffer("bias", bias)
    return layer


def with_parametrised(name):
    def of(layer):
        torch.nn.utils.parametrize.register_parametrization(layer, name, nn.Tanh())
        return layer

    return of


def pruned(layer):
    return torch.nn.utils.prune.random_unstructured(layer, "weight", amount=0.5)


MADE_OF_OTHERS = [with_bias_buffer, with_parametrised("bias"), with_parametrised("weight"), pruned]


@pytest.mark.parametrize("change", MADE_OF_OTHERS)
def test_a_layer_whose_parameters_are_made_of_others_is_refused_and_left_alone_in_a_heads_place(change):
    model, layer = Model(), change(nn.Linear(D, V))
    with pytest.raises(TypeError, match="merge its adapters, dequantise it, or make weight"):
        LogProbHead.from_linear(layer)
    model.head = layer
    assert model.head is layer


@pytest.mark.parametrize("change", MADE_OF_OTHERS)
def test_a_head_whose_parameters_are_made_of_others_is_not_replaced(change):
    model = Model()
    change(model.head)
    with pytest.raises(TypeError, match="head is a LogProbHead whose weight is made of others"):
        model.head = nn.Linear(D, V)


@pytest.mark.parametrize(
    "register",
    [
        "forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook", "state_dict_post_hook",
        "load_state_dict_pre_hook",
    ],
)  # fmt: skip
def test_a_layer_with_hooks_is_refused(register):
    layer = nn.Linear(D, V)
    getattr(layer, f"register_{register}")(lambda *_: None)
    with pytest.raises(TypeError, match="from_linear takes a layer without hooks"):
        LogProbHead.from_linear(layer)


def test_a_head_of_a_head_is_a_head():
    head = LogProbHead(D, V)
    assert LogProbHead.from_linear(head).weight is head.weight


def test_a_head_has_the_sizes_of_its_weight():
    layer = nn.Linear(D, V, bias=False)
    layer.weight = nn.Parameter(torch.randn(V + 3, D))
    head = LogProbHead.from_linear(layer)
    assert (head.in_features, head.out_features) == (D, V + 3)


@pytest.mark.parametrize("size", [V + 7, V - 7])
def test_resizing_the_vocabulary_of_a_model_keeps_its_head(size):
    config = Qwen2Config(
        vocab_size=V, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=D, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.lm_head = LogProbHead.from_linear(model.lm_head)
    before = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(size)
    assert isinstance(model.lm_head, LogProbHead)
    assert model.lm_head.weight.shape == (size, D)
    least = min(size, V)
    assert torch.equal(model.lm_head.weight[:least], before[:least])
    assert model.lm_head(torch.randn(3, D), torch.tensor([0, 1, 2])).logp.shape == (3,)


def test_a_replaced_head_keeps_its_class_hooks_and_attributes():
    x, model = make_inputs(N, D, V, F32, "cpu"), Model()
    model.head = head = Cooler(D, V)
    head.note = "kept"
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    model.head = larger = nn.Linear(D, V + 5, bias=False)
    assert type(model.head) is Cooler
    assert model.head.note == "kept"
    assert model.head.weight is larger.weight
    assert model.head.bias is None
    want = linear_logprob(x.hidden, larger.weight, x.targets, temperature=0.5).logp
    assert torch.equal(model.head(x.hidden, x.targets).logp, want)
    assert calls == [1]
    model.head.register_forward_hook(lambda *_: calls.append(2))
    model.head.register_buffer("own", torch.zeros(1))
    head(x.hidden, x.targets)
    assert calls == [1, 1]
    assert "own" not in head.state_dict()
    assert head.weight.shape == (V, D)
    assert head.bias is not None


def test_layers_that_take_no_heads_place_stay_as_they_are():
    model = Model()
    replaced, other, hooked = nn.Linear(D, D), Scaled(D, V), nn.Linear(D, V)
    hooked.register_forward_hook(lambda *_: None)
    model.layer = replaced
    assert model.layer is replaced
    for layer in (other, hooked):
        model.head = LogProbHead(D, V)
        model.head = layer
        assert model.head is layer
    model.head = LogProbHead(D, V)
    del model.head
    model.head = plain = nn.Linear(D, V)
    assert model.head is plain
