"""The op inside torch: opcheck, torch.compile, autocast, and code that calls it under no_grad."""

import pytest
import torch

from prime_kernels import linear_logprob
from tests.support.oracle import BF16, F32, RUNS, make_inputs, run


def leaves(x):
    return [t.detach().clone().requires_grad_() for t in (x.hidden, x.weight, x.bias)]


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_opcheck_passes(device, backend):
    x = make_inputs(6, 16, 37, BF16, device, bias=True)
    temperature = torch.linspace(0.5, 2, 6, device=device)
    hidden, weight, bias = leaves(x)
    args = (hidden, weight, x.targets, bias, temperature, 20.0, -100, backend, "")
    torch.library.opcheck(torch.ops.prime_kernels.linear_logprob.default, args)
    results = [t.detach() for t in torch.ops.prime_kernels.linear_logprob(*args)]
    given = (x.hidden, x.weight, x.bias, temperature, 20.0, backend, "", True, False, True)
    torch.library.opcheck(
        torch.ops.prime_kernels.linear_logprob_backward.default, (x.dlogp, x.dentropy, *results, *given)
    )


@pytest.mark.parametrize(("device", "backend"), [RUNS[0], RUNS[1], RUNS[4]])
def test_compiles_without_a_graph_break_and_gives_the_same_bits(device, backend):
    x = make_inputs(12, 16, 37, BF16, device, bias=True)

    def loss(hidden, weight, bias):
        h = torch.nn.functional.silu(hidden)
        out = linear_logprob(h, weight, x.targets, bias=bias, temperature=0.8, entropy=True, backend=backend)
        return (out.logp * x.dlogp).sum() + (out.entropy * x.dentropy).sum()

    eager, compiled = leaves(x), leaves(x)
    want = loss(*eager)
    want.backward()
    got = torch.compile(loss, fullgraph=True)(*compiled)
    got.backward()
    torch.testing.assert_close(got, want)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2**-6, atol=1e-3)


def test_compiles_with_a_dynamic_number_of_tokens():
    torch._dynamo.reset()
    op = torch.compile(lambda h, w, t: linear_logprob(h, w, t).logp, fullgraph=True, dynamic=True)
    for N in (3, 17, 64):
        x = make_inputs(N, 16, 37, F32, "cpu")
        torch.testing.assert_close(
            op(x.hidden, x.weight, x.targets), linear_logprob(x.hidden, x.weight, x.targets).logp
        )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters(device):
    x = make_inputs(12, 16, 37, F32, device, bias=True)
    ours = leaves(x)
    with torch.autocast(device, dtype=BF16):
        # The block before the head has already produced bf16; the head's parameters are fp32.
        out = linear_logprob(ours[0].to(BF16), ours[1], x.targets, bias=ours[2], entropy=True)
    assert out.entropy is not None
    torch.autograd.backward((out.logp, out.entropy), (x.dlogp, x.dentropy))
    want = run(linear_logprob, x.to(BF16))
    assert torch.equal(out.logp.double(), want["logp"])
    for leaf, name in zip(ours, ("dhidden", "dweight", "dbias"), strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == F32
        assert torch.equal(leaf.grad.double(), want[name])


def test_saved_tensors_are_the_inputs_and_24_bytes_a_token_beside_them():
    x = make_inputs(100, 16, 37, BF16, "cpu")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        linear_logprob(x.hidden.requires_grad_(), x.weight.requires_grad_(), x.targets)
    beside = [t for t in saved if t is not None and t.data_ptr() not in (x.hidden.data_ptr(), x.weight.data_ptr())]
    assert sum(t.numel() * t.element_size() for t in beside) == 24 * 100
