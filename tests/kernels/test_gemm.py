"""Products: fp32 sums, one rounding, and none that is not needed."""

import pytest
import torch

from prime_kernels import gemm, linear_logprob
from tests.support.oracle import BF16, F16, F32, RUNS, make_inputs, run


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_products_of_16_bit_operands_are_summed_in_fp32(device, dtype):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 512, generator=g).to(device, dtype) for _ in range(2))
    exact = a.double() @ b.double().t()
    out = gemm.mm(gemm.operand(a), gemm.operand(b).t(), out=torch.empty(64, 64, device=device))
    acc = gemm.addmm(out.clone(), gemm.operand(a), gemm.operand(b).t())
    assert (out.double() - exact).norm() <= 1e-6 * exact.norm()
    assert (acc.double() - 2 * exact).norm() <= 2e-6 * exact.norm()


def test_reduced_precision_sums_are_forbidden_and_the_users_choice_restored():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    with gemm.full_precision_sums():
        assert matmul.allow_bf16_reduced_precision_reduction is False
    assert matmul.allow_bf16_reduced_precision_reduction == before


@pytest.mark.parametrize(
    ("frozen", "entropy", "products"),
    [
        # logits in forward and backward, then one product a gradient
        pytest.param((), False, 4, id="nothing-frozen"),
        pytest.param(("hidden",), False, 3, id="frozen-hidden"),
        pytest.param(("weight",), True, 3, id="frozen-weight-entropy"),
        # logits, and their gradient at once
        pytest.param(("weight",), False, 2, id="frozen-weight"),
    ],
)
@pytest.mark.parametrize(("device", "backend"), [*RUNS[:2], *RUNS[3:5]])
def test_no_product_is_computed_for_a_frozen_operand(device, backend, frozen, entropy, products, monkeypatch):
    counted = []
    for name in ("mm", "addmm"):
        original = getattr(gemm, name)
        monkeypatch.setattr(gemm, name, lambda *a, _f=original, **k: (counted.append(1), _f(*a, **k))[1])
    x = make_inputs(16, 32, 130, F32, device)
    hidden = x.hidden.requires_grad_("hidden" not in frozen)
    weight = x.weight.requires_grad_("weight" not in frozen)
    linear_logprob(hidden, weight, x.targets, entropy=entropy, backend=backend).logp.sum().backward()
    assert len(counted) == products
    assert (hidden.grad is None) == ("hidden" in frozen)
    assert (weight.grad is None) == ("weight" in frozen)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_gradients_with_a_frozen_operand_equal_those_with_none(device, backend):
    x = make_inputs(33, 32, 130, BF16, device, bias=True)
    both = run(linear_logprob, x, backend=backend)
    assert x.bias is not None
    for name, leaf in (("dhidden", x.hidden), ("dweight", x.weight), ("dbias", x.bias)):
        alone = leaf.detach().clone().requires_grad_()
        args = [alone if t is leaf else t for t in (x.hidden, x.weight)]
        bias = alone if leaf is x.bias else x.bias
        out = linear_logprob(*args, x.targets, bias=bias, entropy=True, backend=backend)
        (grad,) = torch.autograd.grad((out.logp, out.entropy), alone, (x.dlogp, x.dentropy))
        torch.testing.assert_close(grad.double(), both[name], rtol=2**-7, atol=1e-5)
