"""Boundaries of sequences: read where that costs nothing, and copied nowhere where they are on the device."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from prime_kernels import implicit_reward, linear_prm_loss, prm_loss, reference
from prime_kernels import sequences as module
from prime_kernels.reward import _shares
from prime_kernels.sequences import Sequences
from tests.support.oracle import F32, F64, make_inputs

T, BOUNDS = 50, [0, 20, 29, 30, 50]


class Called(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **kwargs or {})


# What moves numbers between host and device, either way.
MOVES = {"_to_copy", "_local_scalar_dense", "copy_", "_pin_memory", "item", "lift_fresh"}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_boundaries_on_the_device_are_neither_read_nor_copied(dtype):
    # A device whose numbers no host can read.
    bounds, tokens = torch.empty(5, dtype=dtype, device="meta"), torch.empty(T, device="meta")
    with Called() as called:
        found = Sequences.of(bounds, tokens)
        found.of_tokens(T)
        _shares(tokens, 16)
    assert found.host is None
    assert found.bounds.device.type == "meta"
    assert found.count == 4
    assert not MOVES & set(called.names), called.names


def test_boundaries_are_read_from_the_device_where_chunks_are_cut_and_not_in_a_captured_graph(monkeypatch):
    bounds, tokens = torch.empty(5, dtype=torch.int64, device="meta"), torch.empty(T, device="meta")
    with pytest.raises(NotImplementedError, match="no data"):
        Sequences.of(bounds, tokens, read=True)
    monkeypatch.setattr(module, "is_captured", lambda device: True)
    assert Sequences.of(bounds, tokens, read=True).host is None


def test_boundaries_on_the_host_are_refused_in_a_captured_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        tokens = torch.empty(T, device="cuda")
    with pytest.raises(ValueError, match="cu_seqlens must be on the tokens' device while a CUDA graph is captured"):
        Sequences.of(torch.tensor(BOUNDS), tokens)


@pytest.mark.parametrize("name", ["outcomes", "group_ids"])
def test_what_else_a_captured_graph_would_read_from_the_host_is_refused_by_name(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    given = {"outcomes": torch.ones(4), "group_ids": torch.zeros(4, dtype=torch.int64)}
    with FakeTensorMode():
        device = torch.empty(T, device="cuda").device
    with pytest.raises(ValueError, match=f"{name} must be on the tokens' device while a CUDA graph is captured"):
        module.moved(name, given[name], device)


def test_plain_torch_says_that_no_captured_graph_can_hold_its_sums(monkeypatch):
    monkeypatch.setattr(module, "is_captured", lambda device: True)
    with pytest.raises(ValueError, match="backend='torch' sums sequences on the host"):
        Sequences(torch.tensor(BOUNDS), None, None).sums(torch.ones(T))


@pytest.fixture
def unread(monkeypatch):
    """Boundaries as a captured graph has them: on the tokens' device, and unknown to the host."""

    def of(cu_seqlens, tokens, *, read=False):
        good = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == len(tokens)) & (cu_seqlens.diff() > 0).all()
        poison = torch.where(good, 0.0, torch.nan).to(tokens.dtype)
        return Sequences(cu_seqlens.clamp(0, len(tokens)), None, poison)

    monkeypatch.setattr(module.Sequences, "of", staticmethod(of))


@pytest.mark.parametrize("kind", ["ce", "dpo"])
@pytest.mark.parametrize("backend", ["torch", "chunked"])
def test_boundaries_that_the_host_does_not_know_give_the_same_results(unread, backend, kind):
    given = "torch" if backend == "torch" else "triton"
    x = make_inputs(T, 16, 37, F32, "cpu")
    bounds, outcomes, ref = torch.tensor(BOUNDS), torch.tensor([1.0, 0.0, 0.3, 1.0]), x.dlogp - 4
    more = {"kind": kind, "group_ids": torch.tensor([0, 0, 1, 1])}
    exact = x.to(F64)
    found, want = [], []
    for results, inputs, options in ((found, x, {"backend": backend}), (want, exact, {"backend": "torch"})):
        dtype = inputs.hidden.dtype
        leaves = [t.detach().requires_grad_() for t in (inputs.hidden, inputs.weight)]
        out = linear_prm_loss(*leaves, x.targets, ref.to(dtype), bounds, outcomes, **more, **options)
        out.loss.backward()
        results += [*out, *(t.grad for t in leaves)]
        logp = (ref * 1.1).to(dtype).requires_grad_()
        options = {"backend": given if options["backend"] != "torch" else "torch"}
        out = prm_loss(logp, ref.to(dtype), bounds, outcomes, **more, **options)
        out.loss.backward()
        results += [*out, logp.grad]
        rewards = implicit_reward(logp, ref.to(dtype), cu_seqlens=bounds, granularity="whole", **options)
        results += [rewards, *torch.autograd.grad(rewards.square().sum(), logp)]
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [[1, 20, 50], [0, 20, 49], [0, 30, 20, 50], [0, 20, 20, 50], [-5, 20, 50], [0, 99, 50]])
def test_bad_boundaries_that_nobody_read_give_nan_and_read_nothing_outside(unread, bad):
    logp, ref = torch.full((T,), -1.0), torch.full((T,), -2.0)
    bounds = torch.tensor(bad)
    out = prm_loss(logp, ref, bounds, torch.ones(len(bad) - 1), backend="triton")
    assert out.loss.isnan()
    assert out.reward.isnan().all()
    rewards = implicit_reward(logp, ref, cu_seqlens=bounds, granularity="whole", backend="triton")
    assert rewards.isnan().all()


@pytest.mark.parametrize("bad", [[0, 5, 60], [-3, 5, 70], [0, -1, 99]])
def test_nor_does_the_gradient_of_rewards_read_outside(unread, bad):
    logp, mask = torch.full((T,), -1.0, requires_grad=True), torch.zeros(T)
    rewards = implicit_reward(
        logp, torch.zeros(T), cu_seqlens=torch.tensor(bad), granularity="whole", mask=mask, backend="triton"
    )  # fmt: skip
    rewards.sum().backward()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_step_that_ends_behind_the_last_token_that_counts_is_summed_once(backend, seed):
    g = torch.Generator().manual_seed(seed)
    logp, ref = torch.randn(T, generator=g), torch.randn(T, generator=g)
    mask, ends = (torch.rand(T, generator=g) > 0.4).float(), torch.rand(T, generator=g) > 0.7
    mask[[19, 28, 49]] = 0  # the last tokens of three sequences do not count,
    ends[[19, 28, 49]] = True  # and each ends a step
    options = {"mask": mask, "cu_seqlens": torch.tensor(BOUNDS), "granularity": "step", "step_ends": ends, "beta": 0.5}
    want = reference.implicit_reward(logp, ref, **options)
    torch.testing.assert_close(implicit_reward(logp, ref, backend=backend, **options), want)


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["linear", "given", "reward", "tokens"])
def test_sequence_ops_are_captured_in_a_cuda_graph_and_replayed_on_other_numbers(op):
    g = torch.Generator().manual_seed(0)

    def numbers(bounds):
        return {
            "hidden": torch.randn(T, 64, generator=g).cuda(),
            "logp": torch.randn(T, generator=g).cuda(),
            "ref": torch.randn(T, generator=g).cuda(),
            "bounds": torch.tensor(bounds).cuda(),
            "outcomes": torch.rand(4, generator=g).cuda(),
        }

    weight = torch.randn(1000, 64, generator=g).cuda().requires_grad_()
    targets = torch.randint(1000, (T,), generator=g).cuda()

    def run(hidden, logp, ref, bounds, outcomes):
        if op == "linear":
            out = linear_prm_loss(hidden.requires_grad_(), weight, targets, ref, bounds, outcomes)
            return (*out, *torch.autograd.grad(out.loss, (hidden, weight)))
        logp = logp.requires_grad_()
        if op == "given":
            out = prm_loss(logp, ref, bounds, outcomes)
            return (*out, *torch.autograd.grad(out.loss, logp))
        more = {} if op == "tokens" else {"cu_seqlens": bounds, "granularity": "whole"}
        rewards = implicit_reward(logp, ref, **more)
        return (rewards, *torch.autograd.grad(rewards.square().sum(), logp))

    static = numbers(BOUNDS)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(**static)  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(**static)
    for bounds in (BOUNDS, [0, 1, 2, 3, 50], [0, 10, 40, 49, 50]):
        fresh = numbers(bounds)
        with torch.no_grad():
            for name, t in fresh.items():
                static[name].copy_(t)
        graph.replay()
        for a, b in zip(results, run(**fresh), strict=True):
            torch.testing.assert_close(a, b)
