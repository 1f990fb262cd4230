"""The workspace bound, counted allocation by allocation."""

import pytest
import torch

from benchmarks.harness import peak_memory
from benchmarks.scratch import measure, measure_tensors
from prime_kernels import linear_ppo_loss, onepass, set_workspace
from prime_kernels.workspace import MIB
from tests.support.oracle import BF16, F32, F64

SHAPES = [
    pytest.param(64, 16, 20000, id="few-tokens-many-columns"),
    pytest.param(20000, 16, 64, id="many-tokens-few-columns"),
    pytest.param(4000, 64, 3000, id="both"),
    pytest.param(700, 1500, 500, id="wide-hidden"),
]


@pytest.mark.parametrize(("N", "D", "V"), SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_scratch_memory_stays_within_the_workspace(N, D, V, dtype):
    # The full logits of the third shape take 46 MiB.
    scratch = measure(N, D, V, dtype=dtype, device="cpu", backend="torch", workspace=8 * MIB)
    assert 0 < scratch.forward <= 8 * MIB
    assert 0 < scratch.backward <= 8 * MIB


@pytest.mark.parametrize(("N", "D", "V"), SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_pass_losses_stay_within_the_workspace_beside_the_weights_gradient(N, D, V, dtype):
    scratch = measure(N, D, V, dtype=dtype, device="cpu", backend="torch", workspace=16 * MIB, op="ppo")
    assert scratch.bounded, scratch


@pytest.mark.parametrize("op", ["logprob", "ppo"])
@pytest.mark.parametrize(("N", "D", "V", "step"), [(13, 3331, 1629, 2), (125, 19175, 451, 1)])
def test_numbers_of_fp64_are_counted_as_such(N, D, V, step, op):
    """Few tokens that are wide: their copies, not their logits, fill the workspace."""
    hidden, weight = (torch.randn(n, step * D, dtype=F64).requires_grad_() for n in (N, V))
    strided = hidden[:, ::step], weight[:, ::step]
    scratch = measure_tensors(*strided, backend="torch", workspace=4 * MIB, op=op)
    assert scratch.bounded, scratch


@pytest.mark.parametrize(("dtype", "workspace"), [(F32, 504_000), (BF16, 720_000)])
def test_where_tokens_dominate_the_entropys_backward_stays_within_the_workspace_too(dtype, workspace):
    found = measure(20_000, 2, 4, dtype=dtype, device="cpu", backend="torch", workspace=workspace)
    assert found.bounded, found


@pytest.mark.parametrize("dtype", [F32, F64])
def test_what_a_loss_has_of_each_token_is_counted(dtype, monkeypatch):
    """Many tokens and few columns: PPO with every option, in one pass, in two, or refused."""
    N, rows = 12_500, torch.rand(5, 12_500, dtype=dtype)
    hidden, weight = torch.randn(N, 8, dtype=dtype), torch.randn(16, 8, dtype=dtype).requires_grad_()
    targets, size = torch.randint(16, (N,)), MIB // 4 * (2 if dtype is F64 else 1)

    def loss():
        return linear_ppo_loss(
            hidden, weight, targets, -rows[0], rows[1], rows[2], ref_logp=-rows[3], importance=rows[4],
            temperature=0.7, kl_coef=0.1, entropy_coef=0.1, dual_clip=3.0, backend="torch",
        )  # fmt: skip

    set_workspace(6 * size)
    assert 0 < peak_memory(loss, torch.device("cpu")).scratch <= 6 * size
    monkeypatch.setattr(onepass, "plan_one_pass", lambda *_, **__: onepass.OnePass(rows=0, cols=16, passes=2))
    assert 0 < peak_memory(loss, torch.device("cpu")).scratch <= 6 * size
    set_workspace(2 * size)
    with pytest.raises(ValueError, match="is too small for 12500 tokens"):
        loss()


def test_kernels_work_in_the_memory_the_plan_counts():
    scratch = measure(50, 32, 5000, dtype=F32, device="cpu", backend="chunked", workspace=MIB // 2)
    assert 0 < max(scratch.forward, scratch.backward) <= MIB // 2


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "chunked", "fused"])
def test_scratch_memory_stays_within_the_default_workspace_on_cuda(backend):
    # 8 GiB of fp32 logits; dX of the second shape does not fit.
    for N, D, V in ((16384, 1024, 131072), (65536, 4096, 16384)):
        assert measure(N, D, V, dtype=torch.bfloat16, device="cuda", backend=backend).bounded
