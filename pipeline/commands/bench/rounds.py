"""Timing on shared, noisy machines: everything in turn, many times over, and medians.

Every round runs each contender once, so that all of them meet the same weather.
"""

from collections.abc import Callable, Mapping
from statistics import median

Rates = dict[str, float]  # contender -> images per second, the median over the rounds


def interleave(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Rates:
    """Run all contenders `rounds` times in turn, after one warm-up; each returns its rate."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            rate = contender()
            if number > 0:
                rates[name].append(rate)
    return {name: median(values) for name, values in rates.items()}
