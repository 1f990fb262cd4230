"""The package without Triton: it imports, plain torch serves every op, and what needs Triton is refused by name."""

import subprocess
import sys

import pytest
import torch

from prime_kernels.plan import choose_strategy
from tests.support.paths import ROOT

USE = """
import importlib.machinery, importlib.util, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
find_spec = importlib.util.find_spec
found = importlib.machinery.ModuleSpec("triton", None) if sys.argv[1] == "folder" else None
importlib.util.find_spec = lambda name, *a: found if name == "triton" else find_spec(name, *a)

import torch
from prime_kernels import (
    LogProbHead, implicit_reward, linear_logprob, linear_ppo_loss, linear_prm_loss, linear_token_loss, ppo_clip_loss,
    prm_loss,
)
assert "triton" not in sys.modules
torch.manual_seed(0)
hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
targets, one, bounds = torch.zeros(6, dtype=torch.int64), torch.ones(6), torch.tensor([0, 2, 6])
outcomes = torch.tensor([1.0, 0.0])
logp = linear_logprob(hidden, weight, targets, entropy=True).logp
loss = logp.sum() + linear_logprob(hidden, weight.detach(), targets).logp.sum()
loss = loss + linear_ppo_loss(hidden, weight, targets, -one, one, one).loss
loss = loss + linear_token_loss(hidden, weight, targets, lambda logp, _: -logp).loss
loss = loss + linear_prm_loss(hidden, weight, targets, -one, bounds, outcomes).loss
loss = loss + ppo_clip_loss(logp, -one, one, one).loss + prm_loss(logp, -one, bounds, outcomes).loss
loss = loss + implicit_reward(logp, -one, cu_seqlens=bounds, granularity="whole").sum()
loss = loss + LogProbHead(8, 11)(hidden, targets).logp.sum()
loss.backward()
assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
for backend in ("triton", "chunked", "fused"):
    try:
        linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets, backend=backend)
    except ValueError as error:
        assert str(error) == f"backend={backend!r} needs Triton, which is not installed; use backend='torch'", error
    else:
        raise AssertionError(backend)
print("served")
"""


@pytest.mark.parametrize("instead", ["nothing", "folder"])
def test_every_op_runs_without_triton(instead):
    done = subprocess.run([sys.executable, "-c", USE, instead], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "served\n", done.stderr


def test_on_a_gpu_without_triton_plain_torch_serves():
    assert choose_strategy("auto", arch=90, dtype=torch.bfloat16, triton=False) == "torch"
    with pytest.raises(ValueError, match="backend='fused' needs Triton, which is not installed; use backend='torch'"):
        choose_strategy("fused", arch=90, dtype=torch.bfloat16, triton=False)


@pytest.mark.parametrize("aligned", [True, False])
def test_fused_gemms_take_aligned_rows_and_others_run_chunked(aligned):
    found = choose_strategy("fused", arch=90, dtype=torch.bfloat16, aligned=aligned)
    assert found == ("fused" if aligned else "chunked")
