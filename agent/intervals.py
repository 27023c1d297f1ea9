"""How well a mean is known from few seeds: Student's t-intervals."""

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the t-interval for the mean of independent normal values; None for a single one."""
    if len(values) < 2:
        return None
    return t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| < t) = confidence for Student's T, by bisection.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """

    def within(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        cosine, total, term = math.cos(angle), 0.0, 1.0 if freedom % 2 == 0 else math.cos(angle)
        for n in range(freedom % 2 + 1, freedom, 2):
            total += term
            term *= n / (n + 1) * cosine**2
        total *= math.sin(angle)
        return total if freedom % 2 == 0 else 2 / math.pi * (angle + total)

    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < confidence else (low, middle)
    return high
