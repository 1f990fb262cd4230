"""An optimizer step, and what cannot spoil it."""

import copy

import pytest
import torch

from prime_train.models import optim
from tests.support.tiny import EOS, model, weights


def loss_of(net, factor=1.0):
    out = net.transformer(input_ids=torch.tensor([[6, 7, 8, EOS]])).logits
    return out.log_softmax(-1)[..., 3].sum() * factor


def stepped():
    """A model and its AdamW after one good step, so that there is a state to spoil."""
    net = model()
    optimizer = optim.adamw(net, lr=1e-2, weight_decay=0.1)
    assert optim.step(net, optimizer, [loss_of(net)], grad_clip=1.0).applied
    return net, optimizer


def gradient_overflows(net):
    """A finite loss whose gradient is not: d√x/dx at 0."""
    return (loss_of(net) * 0).sqrt()


@pytest.mark.parametrize(
    "losses",
    {
        "nan": lambda net: [loss_of(net, float("nan"))],
        "infinite": lambda net: [loss_of(net, float("inf"))],
        "gradient": lambda net: [gradient_overflows(net)],
        "one of three": lambda net: [loss_of(net), loss_of(net, float("nan")), loss_of(net)],
    }.items(),
    ids=lambda case: case[0],
)
def test_what_is_not_finite_leaves_weights_and_optimizer_untouched_and_is_reported(losses):
    net, optimizer = stepped()
    before, state = weights(net), copy.deepcopy(optimizer.state_dict())
    done = optim.step(net, optimizer, losses[1](net), grad_clip=1.0)
    assert not done.applied
    assert torch.equal(weights(net), before)
    for name, moments in state["state"].items():
        for key, value in moments.items():
            assert torch.equal(value, optimizer.state_dict()["state"][name][key])
    assert optim.step(net, optimizer, [loss_of(net)], grad_clip=1.0).applied


def test_gradients_of_micro_batches_add_up():
    parts, whole = model(), model()
    for net, losses in ((parts, lambda n: (loss_of(n, f) for f in (0.5, 0.3, 0.2))), (whole, lambda n: [loss_of(n)])):
        done = optim.step(net, torch.optim.SGD(net.parameters(), lr=0.1), losses(net), grad_clip=1e9)
        assert done.loss == pytest.approx(loss_of(model()).item(), rel=1e-5)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-5, atol=1e-7)


def test_each_micro_batch_is_forwarded_after_the_one_before_was_backpropagated():
    net, order = model(), []

    def losses():
        for i in range(3):
            order.append(i)
            assert (i == 0) == all(p.grad is None for p in net.parameters())
            yield loss_of(net)

    optim.step(net, torch.optim.SGD(net.parameters(), lr=0.1), losses(), grad_clip=1.0)
    assert order == [0, 1, 2]


def test_the_reported_norm_is_that_before_clipping():
    net = model()
    before = weights(net)
    done = optim.step(net, torch.optim.SGD(net.parameters(), lr=1.0), [loss_of(net, 100.0)], grad_clip=0.5)
    assert done.grad_norm > 0.5
    assert (weights(net) - before).norm().item() == pytest.approx(0.5, rel=1e-3)


def test_a_step_leaves_no_gradients_behind():
    net, _ = stepped()
    assert all(p.grad is None for p in net.parameters())


def test_adamw_takes_the_parameters_that_are_trained():
    net = model()
    net.transformer.model.embed_tokens.weight.requires_grad_(False)
    [group] = optim.adamw(net, lr=1e-3, weight_decay=0.2).param_groups
    assert len(group["params"]) == len(list(net.parameters())) - 1
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.9, 0.999), 0.2)
