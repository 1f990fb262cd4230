"""Outcome verification: math and code answers scored in processes that can be killed, code in a sandbox."""

from prime_train.verify.pool import VerifierPool, metrics
from prime_train.verify.records import Answer, Verdict

__all__ = ["Answer", "Verdict", "VerifierPool", "metrics"]
