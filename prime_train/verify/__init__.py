"""Outcome verification: math and code answers scored in processes that can be killed, code in a sandbox.

`VerifierPool` scores an `Answer` with a `Verdict`. `math` and `code` are the scorers, `sandbox` and `runner` what keeps
a model's program away from everything, `command` is `prime-train verify`. Usable without the rest of the trainer: it
loads neither torch nor models, and shares no memory with who calls it.

May import: nothing.
"""

from .pool import VerifierPool, metrics
from .records import Answer, Verdict

__all__ = ["Answer", "Verdict", "VerifierPool", "metrics"]
