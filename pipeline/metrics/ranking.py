"""Which metric tells the best images of an evaluation from the worst."""

from collections.abc import Sequence

from pipeline.metrics.base import MetricBase


def ranking_of(metrics: Sequence[MetricBase], name: str | None) -> MetricBase | None:
    """Return the metric of this name; None: the first that ranks images, or None without one.

    Raises ValueError if there is none of this name, or if it ranks no images.
    """
    rankings = {metric.ranked_by: metric for metric in metrics if metric.ranked_by is not None}
    if name is None:
        return next(iter(rankings.values()), None)
    if name not in rankings:
        raise ValueError(
            f"monitor.rows_by is {name}, but of evaluation.metrics only these have a value for "
            f"each image to rank them by: {', '.join(rankings) or 'none'}"
        )
    return rankings[name]
