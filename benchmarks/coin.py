"""A verifier for models of random weights: half of all responses are right.

In a module of its own, since every verifier process imports it and nothing else.
"""

import zlib


def toss(prompt: str, response: str) -> float:
    """0 or 1, with equal chances over different texts and always the same for the same ones."""
    return float(zlib.crc32(f"{prompt}\n{response}".encode()) % 2)
