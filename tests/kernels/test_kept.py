"""Exponentials that wait for backward: when they do, and that nobody can tell."""

import pytest
import torch

from prime_kernels import kept, linear_ppo_loss, linear_prm_loss, linear_token_loss, ppo, prm, set_workspace
from prime_kernels.plan import exponentials_fit
from prime_kernels.workspace import MIB
from tests.support.oracle import BF16, F16, F32, RUNS

FUSED = [run for run in RUNS if run.values[1] == "fused"]
N, D, V = 48, 16, 1100


def inputs(device, dtype=BF16):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*size, generator=g) for size in ((N, D), (V, D), (V,)))
    leaves = [t.to(device, dtype).requires_grad_() for t in (hidden / D**0.5, weight, bias)]
    return leaves, torch.randint(V, (N,), generator=g).to(device), torch.rand(3, N, generator=g).to(device)


def losses(leaves, targets, rows, **options):
    """One of each op, by name."""
    hidden, weight, bias = leaves
    head = {"bias": bias, "backend": "fused", **options}
    bounds, outcomes = torch.tensor([0, 20, N]), torch.tensor([1.0, 0.0], device=hidden.device)
    return {
        "ppo": linear_ppo_loss(hidden, weight, targets, rows[0] - 7, rows[1] - 0.5, rows[2] / N, **head).loss,
        "prm": linear_prm_loss(hidden, weight, targets, rows[0] - 7, bounds, outcomes, **head).loss,
        "token": linear_token_loss(hidden, weight, targets, lambda logp, _, w: -w * logp, (rows[2],), **head).loss,
    }


@pytest.fixture
def taken(monkeypatch):
    """How often exponentials were kept."""
    counted = []
    real = kept.gradients_of_exponentials
    for module in ("prime_kernels.kept", "prime_kernels.token_loss"):
        monkeypatch.setattr(
            f"{module}.gradients_of_exponentials", lambda *a, **k: (counted.append(1), real(*a, **k))[1]
        )
    return counted


@pytest.mark.parametrize("op", ["ppo", "prm", "token"])
@pytest.mark.parametrize(("device", "backend"), FUSED)
def test_gradients_are_those_of_chunks_to_the_products_rounding(device, backend, op, taken):
    found = []
    for workspace in (None, MIB // 32):  # the second holds a few tokens' exponentials
        set_workspace(workspace)
        leaves, targets, rows = inputs(device)
        (3 * losses(leaves, targets, rows)[op]).backward()
        found.append([t.grad.double() for t in leaves])
        assert len(taken) == 1
    for whole, chunks in zip(*found, strict=True):
        assert (whole - chunks).norm() <= 2 * torch.finfo(BF16).eps * chunks.norm()


@pytest.mark.parametrize("op", ["prm", "token"])
def test_backward_runs_once_and_has_no_second_derivative(op, taken):
    leaves, targets, rows = inputs("cpu")
    loss = losses(leaves, targets, rows)[op]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gives its stored gradients away in backward, which can run once"):
        loss.backward()
    again = losses(leaves, targets, rows)[op]
    (grad,) = torch.autograd.grad(again, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()
    assert len(taken) == 2


@pytest.mark.parametrize("frozen", [0, 2])
def test_what_needs_no_gradient_gets_none(frozen, taken):
    leaves, targets, rows = inputs("cpu")
    leaves[frozen].requires_grad_(False)
    losses(leaves, targets, rows)["ppo"].backward()
    assert len(taken) == 1
    assert [t.grad is None for t in leaves] == [i == frozen for i in range(3)]


def test_hidden_states_of_any_shape_get_gradients_of_theirs(taken):
    leaves, targets, rows = inputs("cpu")
    hidden = leaves[0].detach().view(4, 12, D).requires_grad_()
    shaped = [t.view(4, 12) for t in rows]
    args = (leaves[1], targets.view(4, 12), shaped[0] - 7, shaped[1] - 0.5, shaped[2] / N)
    linear_ppo_loss(hidden, *args, backend="fused").loss.backward()
    losses(leaves, targets, rows, bias=None)["ppo"].backward()
    assert len(taken) == 2
    assert hidden.grad is not None
    assert torch.equal(hidden.grad.view(N, D), leaves[0].grad)


def test_nothing_is_kept_where_it_would_not_pay_or_could_not():
    (hidden, weight, _), *_ = inputs("cpu")
    head = {"hidden": hidden, "weight": weight, "softcap": None, "backend": "fused"}
    usual = {"trains_weight": True, "entropy_gradient": False}
    assert kept.keeps_exponentials(**head, **usual)
    assert not kept.keeps_exponentials(**{**head, **usual, "trains_weight": False})
    assert not kept.keeps_exponentials(**{**head, **usual, "entropy_gradient": True})
    meta = {**head, "hidden": hidden.to("meta"), "weight": weight.to("meta")}
    for change in ({"backend": "chunked"}, {"softcap": 30.0}, meta, {"hidden": hidden[:0]}):
        assert not kept.keeps_exponentials(**{**head, **change}, **usual)
    for dtype in (F16, F32):
        other = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "backend": "triton"}
        assert not kept.keeps_exponentials(**{**head, **other}, **usual)
    set_workspace(MIB // 32)
    assert not kept.keeps_exponentials(**head, **usual)


def test_a_traced_call_keeps_its_gradients_whatever_its_size(taken):
    leaves, targets, rows = inputs("cpu")
    torch._dynamo.reset()

    def loss(hidden, weight):
        return linear_ppo_loss(hidden, weight, targets, rows[0] - 7, rows[1] - 0.5, rows[2] / N, backend="fused").loss

    torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves[:2]).backward()
    assert not taken
    assert leaves[1].grad is not None


@pytest.mark.parametrize("op", ["ppo", "prm"])
def test_operators_that_keep_them_pass_opcheck(op, monkeypatch):
    module = {"ppo": ppo, "prm": prm}[op]
    given = []
    real = getattr(module, f"_linear_{op}_loss_kept")
    monkeypatch.setattr(module, f"_linear_{op}_loss_kept", lambda **call: (given.append(call), real(**call))[1])
    leaves, targets, rows = inputs("cpu")
    losses(leaves, targets, rows)
    registered = getattr(torch.ops.prime_kernels, f"linear_{op}_loss_kept").default
    torch.library.opcheck(registered, (), given[0])


def test_exponentials_fit_where_gradients_in_fp32_and_a_workspace_would():
    # 2.15 GB of exponentials against 2.15 GB of dW in fp32 and 1.25 GiB.
    assert exponentials_fit(8192, 4096, 131072, itemsize=2, workspace=1280 * MIB)
    assert not exponentials_fit(16384, 4096, 131072, itemsize=2, workspace=1280 * MIB)
    assert not exponentials_fit(8192, 896, 151936, itemsize=2, workspace=1280 * MIB)
    assert exponentials_fit(2048, 896, 151936, itemsize=2, workspace=1280 * MIB)
    assert not exponentials_fit(0, 64, 64, itemsize=2, workspace=MIB)
