"""Row kernels on a tile of logits: rows are padded, and what lies in the padding is nobody's."""

import pytest
import torch

from prime_kernels.constants import FLOOR, INVALID, PADDED
from prime_kernels.kernels import exponentials, rows

N = 5


def padded(V: int, value: float, device="cpu"):
    """Logits [N, V] whose rows start at multiples of `PADDED` columns, with `value` in between."""
    x = torch.full((N, -(-V // PADDED) * PADDED), value, device=device)
    x[:, :V] = 3 * torch.randn(N, V, generator=torch.Generator().manual_seed(V)).to(device)
    return x[:, :V]


def statistics(x, codes, bias, *, entropy):
    state = x.new_zeros(4, N)
    state[0] = FLOOR
    rows.row_stats(x, bias, codes, None, state, 0, None, entropy)
    out = [x.new_empty(N) for _ in range(4)]
    logp, found, row_max, logsum = out
    rows.finish(state[None], codes, logp, found if entropy else None, row_max, logsum)
    return out


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("V", [1, 7, 16, 2047, 2048, 2049, 2065, 4101])
@pytest.mark.parametrize("device", DEVICES)
def test_what_lies_in_the_padding_changes_nothing(device, V, with_bias):
    codes = torch.tensor([0, V - 1, V // 2, 0, V // 3], device=device)
    bias = torch.randn(V, device=device) if with_bias else None
    found = []
    for value in (0.0, torch.nan, torch.inf, 1e30):
        x = padded(V, value, device=device)
        logp, entropy, row_max, logsum = statistics(x, codes, bias, entropy=True)
        z = x.double() + (0 if bias is None else bias.double())
        torch.testing.assert_close(logp.double(), z.log_softmax(1)[torch.arange(N), codes], rtol=1e-5, atol=1e-6)
        scratch = x.as_strided((N * x.stride(0),), (1,))
        dx = scratch.view(torch.bfloat16).view(N, -1)[:, :V]  # in place of the logits
        one = torch.ones(N, device=device)
        rows.row_dlogits(
            x, bias, codes, None, row_max, logsum, entropy, one, -torch.expm1(logp), 0.1 * one, dx, 0, None
        )  # fmt: skip
        found.append((logp, entropy, dx.clone()))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("V", [17, 2048, 2100])
def test_without_the_entropy_everything_else_has_the_same_bits(V):
    codes = torch.tensor([0, 1, 2, INVALID, 16])
    x = padded(V, torch.nan)
    with_it = statistics(x, codes, None, entropy=True)
    without = statistics(x, codes, None, entropy=False)
    for i in (0, 2, 3):
        assert torch.equal(with_it[i].nan_to_num(7.0), without[i].nan_to_num(7.0))
    assert without[0][3].isnan()


@pytest.mark.parametrize("V", [5, 2048, 2051])
def test_a_dead_row_is_exactly_0_whatever_its_logits_and_statistics(V):
    x = padded(V, torch.nan)
    x[1], x[3] = torch.nan, torch.inf
    codes, one, nan = torch.tensor([0, 1, 2, 3, 4]), torch.ones(N), torch.full((N,), torch.nan)
    alive = torch.tensor([1.0, 0, 1, 0, 1])
    dx = torch.empty(N, -(-V // PADDED) * PADDED)[:, :V]
    dead = torch.tensor([1, 3])
    finite = torch.zeros(N)
    stats = [torch.where(alive == 0, nan, finite) for _ in range(3)]
    rows.row_dlogits(x, None, codes, None, *stats, alive, one, alive, dx, 0, None)
    assert dx[dead].eq(0).all()
    assert dx[[0, 2, 4]].ne(0).any(1).all()


@pytest.mark.parametrize("left", [1, 2, 3])
@pytest.mark.parametrize("V", [13, 2048, 2049])
def test_a_target_and_others_may_be_banned(V, left):
    x, codes = padded(V, torch.nan), torch.full((N,), 2)  # column 2 is banned unless three are left
    bias = torch.zeros(V)
    bias[left:] = -torch.inf
    logp, entropy, *_ = statistics(x, codes, bias, entropy=True)
    log_p = (x.double() + bias).log_softmax(1)
    torch.testing.assert_close(logp.double(), log_p[:, 2], rtol=1e-5, atol=1e-6)
    want = torch.special.entr(log_p.exp()).sum(1)
    torch.testing.assert_close(entropy.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("V", [13, 2048, 2049])
def test_a_target_that_alone_is_not_banned_is_certain(V):
    bias = torch.full((V,), -torch.inf)
    bias[2] = 1.0
    logp, entropy, *_ = statistics(padded(V, torch.nan), torch.full((N,), 2), bias, entropy=True)
    assert logp.eq(0).all()
    assert entropy.eq(0).all()


@pytest.mark.parametrize("V", [13, 1024, 2048, 2049])
def test_a_row_without_a_column_that_is_not_banned_is_no_distribution(V):
    codes = torch.tensor([0, V - 1, V // 2, 0, V // 3])
    bias = torch.full((V,), -torch.inf)
    logp, entropy, *_ = statistics(padded(V, torch.nan), codes, bias, entropy=True)
    found = [logp, entropy, *statistics(torch.full_like(padded(V, 0.0), -torch.inf), codes, None, entropy=True)[:2]]
    g = torch.Generator().manual_seed(V)
    h, w = (torch.randn(n, 16, generator=g).bfloat16() for n in (N, V))
    partials = exponentials.statistics(h, w, bias, codes, None, None, 0, 4, True)[None]
    of_fused = [torch.empty(N) for _ in range(4)]
    rows.finish(partials, codes, *of_fused)
    for result in (*found, *of_fused[:2]):
        assert result.isnan().all()
