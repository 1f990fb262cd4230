"""What every kernel shares: the head's logit, accurate elementary functions, and the running row statistics.

The statistics of a row are kept over its *other* tokens, those that are not the target, because log p of a target
that leads by more than 16 nats is −log1p(Σ_others), which `target − logsumexp` rounds to 0 in fp32:

    max     m = max_{v≠t} z_v
    sum     s = Σ_{v≠t} e^{z_v − m}
    moment  u = Σ_{v≠t} e^{z_v − m}·(z_v − m)        for the entropy; left out where nobody asked for it
    target  z_t, or 0 where the target is not among the columns seen

Partial statistics of disjoint columns merge exactly in any grouping; target parts add up.
"""

import triton
import triton.language as tl

from ..constants import EXP_FLOOR, FLOOR, IGNORED, PADDED

# For every launch whose numbers meet those of another one. A compiler that fuses x·s − m into one instruction rounds
# x·s there and not where m came from; between two such kernels a row's softmax would no longer add up to 1.
EXACT = {"enable_fp_fusion": False}

_FLOOR = tl.constexpr(FLOOR)
_PADDED = tl.constexpr(PADDED)
_IGNORED = tl.constexpr(IGNORED)
_EXP_FLOOR = tl.constexpr(EXP_FLOOR)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x in one multiplication and one instruction; 0 below 2⁻¹²⁶, where `tl.exp` takes two more to go on."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def tanh_and_slope(x):
    """tanh(x) to 1.5 ulp, and its derivative 1 − tanh² without cancellation."""
    e = exp(-2.0 * tl.abs(x))
    r = 1.0 / (1.0 + e)
    far = 1.0 - 2.0 * e * r
    # |x| ≤ 5/8: x + x·t·P(t), t = x², with P interpolating (tanh(x)/x − 1)/t at the Chebyshev nodes.
    t = x * x
    p = tl.fma(t, -0.006096714176237583, 0.020997179672122)
    p = tl.fma(p, t, -0.05385090783238411)
    p = tl.fma(p, t, 0.1333276927471161)
    p = tl.fma(p, t, -0.333333283662796)
    near = tl.fma(x * t, p, x)
    return tl.where(tl.abs(x) <= 0.625, near, tl.where(x < 0, -far, far)), 4.0 * e * r * r


@triton.jit
def log1p(x):
    """log(1 + x) for x ≥ 0, exact to rounding for small x: the error of 1 + x cancels in x/((1 + x) − 1)."""
    y = 1.0 + x
    # Where y is inf, so is log(y); the quotient would be NaN.
    return tl.where(y == 1.0, x, tl.where(x > 1e18, tl.log(y), tl.log(y) * (x / (y - 1.0))))


@triton.jit
def inverse_temperature(tau):
    """1/τ of each row; NaN where τ is not positive or infinite, so that such a row has no plausible result."""
    return tl.where((tau > 0) & (tau < float("inf")), tl.div_rn(1.0, tau), float("nan"))


@triton.jit
def head_logit(x, bias, scale, softcap):
    """z = softcap·tanh((x + bias)/softcap)·scale for raw products x; None leaves a step out."""
    if bias is not None:
        x = x + bias
    if softcap is not None:
        x, _ = tanh_and_slope(tl.div_rn(x, softcap))
        x = x * softcap
    if scale is not None:
        x = x * scale
    return x


@triton.jit
def merge(m_a, s_a, u_a, m_b, s_b, u_b):
    """Statistics of the union of two disjoint sets of columns."""
    m = tl.maximum(m_a, m_b)
    a = exp(m_a - m)
    b = exp(m_b - m)
    u = a * (u_a + s_a * (m_a - m)) + b * (u_b + s_b * (m_b - m))
    return m, a * s_a + b * s_b, u


@triton.jit
def merge_sums(m_a, s_a, m_b, s_b):
    """`merge` without the moment."""
    m = tl.maximum(m_a, m_b)
    return m, exp(m_a - m) * s_a + exp(m_b - m) * s_b


@triton.jit
def logit_gradient(
    x, bias, scale, softcap, is_target, m, logsum, entropy, dlogp, at_target, dentropy
):  # fmt: skip
    """∂L/∂x for raw products x, from ∂L/∂log p (dlogp) and ∂L/∂H (dentropy, or None), through `head_logit`:

        p_v = e^{(z_v − m) − logsum},  ∂log p_t/∂z_v = [v = t] − p_v,  ∂H/∂z_v = −p_v·(log p_v + H)

    The target's ∂L/∂z_t comes in as `at_target`, from the row's results, in which 1 − p_t does not cancel. A row whose
    derivatives are 0, such as an ignored one, is exactly 0, whatever else it holds.
    """
    if bias is not None:
        x = x + bias
    z = x
    if softcap is not None:
        tanh, slope = tanh_and_slope(tl.div_rn(x, softcap))
        z = tanh * softcap
    if scale is not None:
        z = z * scale
    logp = (z - m) - logsum
    p = exp(logp)
    of_logp = dlogp
    if dentropy is not None:
        of_logp = dlogp + dentropy * (tl.maximum(logp, _EXP_FLOOR) + entropy)
    d = tl.where(is_target, at_target, -of_logp * p)
    if softcap is not None:
        d *= slope
    if scale is not None:
        d *= scale
    dead = dlogp == 0.0
    if dentropy is not None:
        dead = dead & (dentropy == 0.0)
    return tl.where(dead, 0.0, d)
