"""What kernels, tiles and checks agree on, known without Triton."""

import os
from importlib.util import find_spec

_triton = find_spec("triton")
HAS_TRITON = _triton is not None and _triton.origin is not None  # a mere folder of that name is none
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# Stands for the maximum of no logits. Finite, so that no difference of maxima is −inf − −inf.
FLOOR = -1e38
# Codes of targets that are no column: an ignored token (log-prob 0), a target outside the vocabulary (NaN).
IGNORED, INVALID = -(1 << 62), -(1 << 62) + 1
# Floor of z − max where it multiplies e^{z − max}: e^{−200} is 0 in fp32, and 0·−200 is 0 where 0·−inf is NaN.
EXP_FLOOR = -200.0
# Rows of logits and of their gradients start at multiples of so many columns, and kernels read and write up to there: a
# thread moves 16 bytes at a time wherever the vocabulary ends. What stands in the padding is nobody's; it may be NaN.
PADDED = 16
# Columns of the partial statistics of PPO's loss.
PPO_STATS = ("tokens", "clipped", "kl", "ratio", "entropy", "ratio_max")
