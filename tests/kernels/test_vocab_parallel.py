"""A vocabulary spread over 2 and 4 gloo processes gives the results and gradients of the whole one."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from prime_kernels import linear_logprob, set_workspace
from tests.support.oracle import BF16, F32, Inputs, assert_results_exact, make_inputs, run
from tests.support.processes import run_ranks

V = 301
# Rows of the vocabulary on each rank: unequal, one rank with a single row.
SHARDS = {2: (140, 161), 4: (100, 1, 120, 80)}


def inputs(dtype: torch.dtype) -> Inputs:
    x = make_inputs(50, 40, V, dtype, "cpu", bias=True, scale=3.0, temperature=torch.linspace(0.5, 2, 50), softcap=20.0)
    x.targets[:4] = torch.tensor([-100, 0, V - 1, 140])
    return x


def on_rank(backend: str) -> dict[str, Any]:
    """Results and gradients of a rank's rows."""
    dist.init_process_group("gloo")
    try:
        rank, world = dist.get_rank(), dist.get_world_size()
        rows = slice(sum(SHARDS[world][:rank]), sum(SHARDS[world][: rank + 1]))
        op = partial(linear_logprob, vocab_group=dist.group.WORLD, backend=backend)
        found: dict[str, Any] = {}
        for dtype in (BF16,) if backend == "fused" else (F32, BF16):
            x = inputs(dtype)
            assert x.bias is not None
            shard = replace(x, weight=x.weight[rows], bias=x.bias[rows])
            found[str(dtype)] = run(op, shard)
            # Several blocks of tokens, reduced one after the other.
            set_workspace(60_000)
            found[f"{dtype} tiled"] = run(op, shard)
            set_workspace(None)
        try:
            op(x.hidden, shard.weight, torch.full_like(x.targets, V))
        except ValueError as error:
            found["error"] = str(error)
        return found
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("world", "backend"), [(2, "torch"), (4, "torch"), pytest.param(2, "chunked", marks=pytest.mark.slow), (4, "fused")]
)
def test_sharded_vocabulary_equals_the_whole(world, backend):
    ranks = run_ranks(world, on_rank, backend)
    assert all(found["error"].startswith(f"targets must be in [0, {V})") for found in ranks)
    for dtype in (BF16,) if backend == "fused" else (F32, BF16):
        whole = run(linear_logprob, inputs(dtype), backend=backend)
        for label in (str(dtype), f"{dtype} tiled"):
            found = [rank[label] for rank in ranks]
            for name in ("logp", "entropy", "dhidden"):
                assert all(torch.equal(found[0][name], other[name]) for other in found[1:]), name
            joined = {name: found[0][name] for name in ("logp", "entropy", "dhidden")}
            joined |= {name: torch.cat([f[name] for f in found]) for name in ("dweight", "dbias")}
            # Exact against fp64 as the whole is, and the same numbers up to the order of fp32 sums.
            assert_results_exact(joined, inputs(dtype))
            half_ulp = 2**-7 if dtype is BF16 else 1e-4
            for name, value in joined.items():
                tolerance = 1e-5 if name in ("logp", "entropy") else half_ulp
                torch.testing.assert_close(value, whole[name], rtol=tolerance, atol=tolerance)


def test_a_group_of_one_is_no_group():
    x = inputs(BF16)
    want = run(linear_logprob, x)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        got = run(linear_logprob, x, vocab_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(got[name], want[name]) for name in want)
