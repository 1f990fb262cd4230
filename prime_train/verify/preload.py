"""Imported once by the server that workers are forked from: what every worker needs, already used once.

The parser of formulas learns its grammar while it reads, a tenth of a second for each new construction; forked workers
find it learnt.
"""

from . import code, expressions, math

__all__ = ["code", "math"]

for _formula in (
    r"\frac{x^{2}-1}{2\sqrt{3}}+\pi",
    r"-2 x(n+1)/3", r"\left(a+b\right)e^{-2t}\cos(t)", r"\sqrt[3]{7}\cdot 2^{10}-\ln 2",
    r"\lfloor n/2\rfloor+\binom{n}{2}", r"3!+\log_{2} n", r"|x|-x_{1}",
):  # fmt: skip
    expressions.parse(_formula)
