"""Products: fp32 sums, one rounding, and none that is not needed."""

from threading import Barrier, Thread

import pytest
import torch

from prime_kernels import gemm, linear_logprob, linear_ppo_loss, linear_prm_loss, linear_token_loss
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


FLAGS = [f"_get_cublas_{name}" for name in gemm.FLAGS]


def flags():
    return [getattr(torch._C, name)() for name in FLAGS]


@pytest.fixture
def users_choice():
    """(True or False, split-K allowed or not) of bf16 sums, set as a user sets it."""
    matmul, before = torch.backends.cuda.matmul, torch._C._get_cublas_allow_bf16_reduced_precision_reduction()
    yield lambda *pair: setattr(matmul, "allow_bf16_reduced_precision_reduction", pair)
    matmul.allow_bf16_reduced_precision_reduction = before


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_column_sums_are_exact_to_fp32_with_and_without_a_factor_of_each_row(device, dtype):
    g = torch.Generator().manual_seed(0)
    t = torch.randn(300, 70, generator=g).to(device, dtype)
    factor = torch.randint(-8, 8, (300,), generator=g).to(device, F32)  # in any dtype the same
    exact = t.double()
    torch.testing.assert_close(gemm.column_sums(t, F32).double(), exact.sum(0), rtol=1e-5, atol=1e-5)
    if device == "cuda" or dtype == F32:  # a CPU sums no 16-bit products in fp32
        got = gemm.column_sums(t, F32, factor).double()
        torch.testing.assert_close(got, (exact * factor[:, None].double()).sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("pair", [(True, True), (False, True), (False, False)])
def test_reduced_precision_sums_are_forbidden_and_the_users_choice_restored(users_choice, pair):
    users_choice(*pair)
    before = flags()
    with gemm.full_precision_sums():
        with gemm.full_precision_sums():
            assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False
        assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False
        assert torch._C._get_cublas_allow_bf16_reduced_precision_reduction()[1] is pair[1]
    assert flags() == before


def test_flags_are_restored_by_the_last_thread_that_leaves(users_choice):
    users_choice(True, True)
    before = flags()
    seen = []

    def work(entered: Barrier, left: Barrier, first: bool):
        with gemm.full_precision_sums():
            entered.wait()
            if not first:
                left.wait()  # the other one has left, and sums are still in full precision here
                seen.append(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)
        if first:
            left.wait()

    for _ in range(20):
        barriers = Barrier(2), Barrier(2)
        threads = [Thread(target=work, args=(*barriers, first)) for first in (True, False)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert flags() == before
    assert seen == [False] * 20


def test_what_the_user_allows_while_an_op_runs_is_forbidden_to_the_next_and_kept(users_choice):
    users_choice(False, True)
    with gemm.full_precision_sums():
        users_choice(True, True)
        with gemm.full_precision_sums():
            assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False
    assert torch._C._get_cublas_allow_bf16_reduced_precision_reduction() == (True, True)


def test_a_process_forked_inside_an_op_has_the_flags_as_they_were(users_choice):
    users_choice(True, True)
    with gemm.full_precision_sums():
        gemm._flags.forked()  # as a child does first
        assert torch._C._get_cublas_allow_bf16_reduced_precision_reduction() == (True, True)
        assert gemm._flags.inside == 0
    assert gemm._flags.inside == 0  # though the child leaves the block as its parent does
    with gemm.full_precision_sums():
        pass
    assert torch._C._get_cublas_allow_bf16_reduced_precision_reduction() == (True, True)


def test_an_error_inside_an_op_leaves_the_flags_as_they_were(users_choice):
    users_choice(False, False)
    before = flags()
    with pytest.raises(KeyError), gemm.full_precision_sums():
        raise KeyError
    assert flags() == before


def test_ops_on_a_cpu_touch_no_flag_of_the_process(monkeypatch):
    monkeypatch.setattr(gemm._flags, "enter", lambda: pytest.fail("a CPU has no use for cuBLAS's flags"))
    linear_logprob(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]))


def test_a_call_asks_torch_nothing_that_its_oldest_compiler_cannot_trace(monkeypatch):
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: pytest.fail("asked for autocast"))
    x = make_inputs(4, 8, 9, F32, "cpu")
    run(linear_logprob, x)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_autocast_reaches_the_arguments_and_nothing_inside(device, backend):
    """The same bits as casting by hand."""
    x = make_inputs(33, 32, 130, F32, device, bias=True)
    rows = [x.dlogp - 5, x.dlogp, x.dentropy]

    def neg(logp, _, a):
        return -a * logp

    head = {"backend": backend}
    losses = [
        lambda h, w, b: linear_logprob(h, w, x.targets, entropy=True, bias=b, **head).logp.sum(),
        lambda h, w, b: linear_logprob(h, w.detach(), x.targets, **head).logp.sum(),
        lambda h, w, b: linear_ppo_loss(h, w, x.targets, *rows, entropy_coef=0.01, bias=b, **head).loss,
        lambda h, w, b: linear_token_loss(h, w, x.targets, neg, rows[1:2], bias=b, **head).loss,
        lambda h, w, b: (
            linear_prm_loss(h, w, x.targets, rows[0], torch.tensor([0, 33]), rows[1][:1].sigmoid(), bias=b, **head).loss
        ),
    ]
    for op, of in enumerate(losses):
        found = []
        for cast in (False, True):
            leaves = [t.detach().to(F32 if cast else BF16).requires_grad_() for t in (x.hidden, x.weight, x.bias)]
            with torch.autocast(device, dtype=BF16, enabled=cast):
                loss = of(*leaves)
                loss.backward()  # autograd runs under autocast, too
            found.append([loss, *(t.grad.to(BF16) for t in leaves if t.grad is not None)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), op


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
