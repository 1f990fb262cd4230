"""How much scratch memory an op may take beyond its inputs, outputs and gradients."""

from numbers import Integral

MIB = 1 << 20

DEFAULT_LOGPROB_WORKSPACE = 512 * MIB
DEFAULT_ONE_PASS_WORKSPACE = 1280 * MIB

_override: int | None = None


def set_workspace(nbytes: int | None) -> None:
    """Bound the scratch memory of every op of this package to `nbytes` bytes; None restores the default.

    The default is 512 MiB for log-probs and 1.25 GiB for one-pass losses. The bound is on what an op allocates
    beyond its inputs, outputs and gradients. A larger one lets an op work in larger tiles; results agree to fp32
    rounding, and the same bound gives the same bits. The setting is the process's own, read when an op runs.

    Raises:
        ValueError: `nbytes` is not a positive integer. A bound too small for the shapes of a call is reported
            by that call.
    """
    global _override
    if nbytes is not None and (isinstance(nbytes, bool) or not isinstance(nbytes, Integral) or nbytes <= 0):
        raise ValueError(f"nbytes must be a positive number of bytes or None, got {nbytes!r}")
    _override = None if nbytes is None else int(nbytes)


def one_pass_workspace() -> int:
    """Bytes that one call of a one-pass loss may take, beside the fp32 sum of the weight's gradient."""
    return DEFAULT_ONE_PASS_WORKSPACE if _override is None else _override


def logprob_workspace() -> int:
    """Bytes that one call of `linear_logprob` (or its backward) may take."""
    return DEFAULT_LOGPROB_WORKSPACE if _override is None else _override
