"""The plan: which strategy, which tiles, and that the tiles cover everything within the workspace."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prime_kernels import plan
from prime_kernels.plan import blocks, choose_strategy, plan_tiling

MIB = 1 << 20


@pytest.mark.parametrize(
    ("backend", "arch", "dtype", "want"),
    [
        ("auto", 0, torch.bfloat16, "torch"),
        ("auto", 75, torch.float16, "torch"),
        ("auto", 80, torch.bfloat16, "chunked"),
        ("auto", 90, torch.bfloat16, "fused"),
        ("triton", 90, torch.float16, "fused"),
        ("auto", 100, torch.bfloat16, "chunked"),
        ("auto", 90, torch.float32, "chunked"),
        ("auto", 90, torch.float64, "torch"),
        ("auto", 120, torch.bfloat16, "chunked"),
        ("triton", 0, torch.float32, "chunked"),
        ("chunked", 90, torch.bfloat16, "chunked"),
        ("fused", 90, torch.bfloat16, "fused"),
        ("torch", 90, torch.float64, "torch"),
    ],
)
def test_strategy_follows_backend_architecture_and_dtype(backend, arch, dtype, want):
    assert choose_strategy(backend, arch=arch, dtype=dtype) == want


def test_strategy_refuses_what_no_kernel_takes():
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', .*'fused', got 'cuda'"):
        choose_strategy("cuda", arch=90, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"backend='fused' takes hidden of bfloat16 or float16, got torch.float32"):
        choose_strategy("fused", arch=90, dtype=torch.float32)
    for backend in ("triton", "chunked", "fused"):
        with pytest.raises(ValueError, match=rf"backend='{backend}' needs a GPU of sm_80 or newer, got sm_75"):
            choose_strategy(backend, arch=75, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"backend='triton' takes .* got torch.float64; use backend='torch'"):
        choose_strategy("triton", arch=90, dtype=torch.float64)


def test_a_7b_head_at_8192_tokens_is_cut_into_slices_with_all_of_dx_resident():
    tiling = plan_tiling(8192, 4096, 131072, workspace=512 * MIB, bytes_per_logit=6, half=True, copies=False)
    assert (tiling.rows, tiling.resident) == (8192, 8192)
    assert tiling.cols % 256 == 0
    # 384 MiB remain beside 128 MiB of dX: tiles of about 8,000 columns, whose GEMMs fill any GPU.
    assert 7168 <= tiling.cols <= 8192


def test_only_some_dx_is_resident_when_all_of_it_exceeds_half_the_workspace():
    tiling = plan_tiling(65536, 4096, 131072, workspace=512 * MIB, bytes_per_logit=6, half=True, copies=False)
    assert 0 < tiling.resident < 65536
    assert tiling.resident * 4096 * 4 <= 256 * MIB
    assert tiling.resident % tiling.rows == 0


def test_blocks_of_tokens_do_not_depend_on_the_vocabulary():
    # Ranks with unequal parts of a vocabulary reduce the same blocks together.
    shared = {"workspace": 512 * MIB, "bytes_per_logit": 6, "half": True, "copies": False}
    tilings = [plan_tiling(50_000, 3584, V, **shared) for V in (1, 97, 38016, 152064)]
    assert len({(t.rows, t.resident) for t in tilings}) == 1


@given(
    N=st.integers(1, 200_000),
    D=st.integers(1, 8192),
    V=st.integers(1, 300_000),
    mib=st.integers(64, 2048),
    bytes_per_logit=st.sampled_from([2, 4, 6, 12, 24]),
    half=st.booleans(),
    copies=st.booleans(),
)
def test_tiles_stay_within_the_workspace_for_any_shape(N, D, V, mib, bytes_per_logit, half, copies):
    tiling = plan_tiling(N, D, V, workspace=mib * MIB, bytes_per_logit=bytes_per_logit, half=half, copies=copies)
    rows, cols, resident = tiling.rows, tiling.cols, tiling.resident
    assert 1 <= rows <= N
    assert 1 <= cols <= V
    assert 0 <= resident <= N
    held = rows * cols * bytes_per_logit
    held += max(resident, rows) * D * 4 * half
    held += cols * D * 4 * (half and (rows < N or copies))
    held += (rows + cols) * D * 4 * copies
    assert held <= mib * MIB


def test_a_workspace_too_small_for_any_tile_is_refused_with_the_size_it_takes():
    with pytest.raises(ValueError, match=r"a workspace of 1000 bytes is too small for 64 tokens of hidden size 4096"):
        plan_tiling(64, 4096, 1000, workspace=1000, bytes_per_logit=6, half=True, copies=False)


@given(st.integers(0, 10_000), st.integers(1, 3_000))
def test_blocks_cover_a_range_once_and_in_order(total, size):
    covered = [i for start, stop in blocks(total, size) for i in range(start, stop)]
    assert covered == list(range(total))
    assert all(stop - start <= size for start, stop in blocks(total, size))


@pytest.mark.parametrize("arch", [101, 103, 110])
def test_a_relative_of_sm_100_has_its_settings(arch):
    for bias in (False, True):
        ours, its = (plan.exponentials_settings(a, bias=bias, softcap=False) for a in (arch, 100))
        assert ours == its


@pytest.mark.parametrize("arch", [0, 80, 86, 89, 90, 100, 103, 120])
def test_every_architecture_has_settings(arch):
    for flag in (False, True):
        assert plan.exponentials_settings(arch, bias=flag, softcap=flag).block_n > 0
        assert plan.dlogits_settings(arch, entropy=flag, softcap=flag).block_n > 0
    assert plan.exponentials_settings(89, bias=False, softcap=False).tma is False


def test_settings_of_a_heavier_epilogue_have_no_larger_tile():
    for settings in plan.FUSED.values():
        sizes = [s.block_n * s.block_v for s in settings]
        assert sizes == sorted(sizes, reverse=True)


def one_pass(N, **changes):
    settings = {"workspace": 1280 * MIB, "bytes_per_logit": 4, "copies": False, "need_dw": True, "flop_per_byte": 184}
    return plan.plan_one_pass(N, 4096, 131072, **{**settings, **changes})


def test_chunks_of_one_pass_are_even_and_all_that_fits_where_one_does():
    # 1.25 GiB holds the fp32 logits of 2,559 tokens.
    found = one_pass(8192)
    assert (found.passes, found.rows, found.cols) == (1, 2048, 131072)
    assert one_pass(2000).rows == 2000


@pytest.mark.parametrize(
    ("N", "D", "limit", "rows"),
    [
        # Tiles of 128 × 256: those of 1024 rows leave 4 of 132 processors idle, once; 1664 rows take two rounds.
        (8192, 4096, 1927, 1024),
        (8192, 3584, 1600, 1152),
        (32768, 3584, 4100, 3584),
    ],
)
def test_chunks_keep_all_processors_busy_where_that_is_worth_a_few_tokens(N, D, limit, rows):
    found = plan.plan_one_pass(
        N, D, 131072, workspace=limit * 131072 * 4 + (N * 48 + limit * (32 * 4 + 112)), bytes_per_logit=4,
        copies=False, need_dw=False, flop_per_byte=184, processors=132,
    )  # fmt: skip
    assert found.rows == rows


@given(N=st.integers(1, 100_000), D=st.integers(1, 8192), limit=st.integers(1, 20_000), dh=st.booleans())
def test_chunks_for_many_processors_are_within_the_workspace_and_no_more_than_twice_as_many(N, D, limit, dh):
    asked = {"workspace": limit * 4000 + N * 48, "bytes_per_logit": 4, "copies": False, "need_dw": True}
    asked |= {"flop_per_byte": 184, "need_dh": dh}
    one, many = (plan.plan_one_pass(N, D, 1000, processors=p, **asked) for p in (1, 132))
    if many.passes == 1:
        assert many.rows * 1000 * 4 + N * 48 <= asked["workspace"]
        assert one.rows <= 2 * many.rows + 256
        assert dh or many == one


def test_two_passes_where_chunks_are_too_small_to_pay_for_the_weights_gradient():
    # 256 MiB: 511 tokens a chunk, under the 736 at which one pass breaks even.
    assert one_pass(8192, workspace=256 * MIB).passes == 2
    assert one_pass(8192, workspace=512 * MIB).passes == 1
    # Without a gradient of the weight there is nothing to pay for, nor with a single chunk.
    assert one_pass(8192, workspace=256 * MIB, need_dw=False).passes == 1
    assert one_pass(500, workspace=256 * MIB).passes == 1
    assert one_pass(8192, workspace=MIB // 4).passes == 2


@given(N=st.integers(1, 100_000), mib=st.integers(16, 4096), copies=st.booleans())
def test_chunks_of_one_pass_stay_within_the_workspace(N, mib, copies):
    D, V = 1024, 50_000
    found = plan.plan_one_pass(
        N, D, V, workspace=mib * MIB, bytes_per_logit=4, copies=copies, need_dw=True, flop_per_byte=184
    )
    if found.passes == 1:
        held = found.rows * V * 4 + copies * 4 * D * (2 * found.rows + found.cols)
        assert 1 <= found.rows <= N
        assert held <= mib * MIB


def test_a_frozen_head_keeps_the_gradient_where_it_is_no_larger_than_the_workspace():
    asked = {"frozen": True, "entropy": False, "workspace": 512 * MIB}
    assert plan.keeps_logp_gradient(8192, 4096, **asked)
    assert not plan.keeps_logp_gradient(65536, 4096, **asked)
    for change in ({"frozen": False}, {"entropy": True}):
        assert not plan.keeps_logp_gradient(8192, 4096, **{**asked, **change})
