"""Timing on shared, noisy machines: medians over rounds that run every contender once.

So the load of the machine changes for all contenders alike.
"""

from collections.abc import Callable, Mapping
from statistics import median

Rates = dict[str, float]  # contender -> images per second, the median over the rounds


def share(of_ceiling: float) -> str:
    """Return a share of a ceiling: 93 %, or 1.3 x where there is more than the ceiling."""
    return f"{of_ceiling:.0%}" if of_ceiling <= 1 else f"{of_ceiling:.3g} x"


def rounds_of(rounds: int) -> str:
    """Return what the figures are: medians, and of how many rounds."""
    return "1 round" if rounds == 1 else f"medians of {rounds} rounds"


def interleave(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Rates:
    """Run all contenders `rounds` times in turn, after one warm-up; each returns its rate."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            rate = contender()
            if number > 0:
                rates[name].append(rate)
    return {name: median(values) for name, values in rates.items()}
