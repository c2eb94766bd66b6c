"""Exact statistics of all latents: the same bits for any number of processes, and after restarts.

stored values of one task -> `partial_of` (float64, fixed order of additions) -> commit record
all partials, in plan order -> `merge` (math.fsum: correctly rounded) -> latent_stats.json

The statistics are of the stored, rounded values, so `verify` computes the same bits from the files.
No BLAS and no vectorised exp is used: their last bits depend on the processor. They cover the field
mu, or z if samples are stored, and not the mirrored views.

# n valid rows; C channels = first axis of the latent; P positions = its other axes; M = n P
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.latents.exact_math import portable_exp

# With more channels the covariance is left out: its sums are in every commit record, about 165 KB
# each at 128 channels.
MAX_COVARIANCE_CHANNELS = 128
# A channel is active if Var(mu) over the data exceeds this (Burda, Grosse and Salakhutdinov 2016,
# "Importance weighted autoencoders", section 5.3).
ACTIVE_VARIANCE = 0.01
NOT_FINITE = "latent"  # stage of a fault: latents that are not finite
_CHUNK_VALUES = 1 << 16  # summed at once; fixed: the order of additions depends on it


@dataclass(frozen=True)
class Partial:
    """Sums over the valid rows of one task, per channel."""

    field: str  # mu or z; called mu below
    rows: int
    not_finite: int  # rows left out because of a latent that is not finite
    count: int  # M, values per channel
    total: list[float]  # [C] sum of mu
    # Upper triangle, row by row, of the sum of (mu - mean)(mu - mean)^T about the task's mean; with
    # more than MAX_COVARIANCE_CHANNELS only its diagonal.
    moment: list[list[float]]
    low: list[float]  # [C]; empty without valid rows, like `high`
    high: list[float]
    sigma2_total: list[float] | None  # [C] sum of exp(logvar); None: no logvar is stored


def has_covariance(num_channels: int) -> bool:
    """Return whether the covariance is computed for this number of channels."""
    return num_channels <= MAX_COVARIANCE_CHANNELS


def partial_of(
    latents: dict[str, NDArray[Any]],
    valid: NDArray[np.bool_],
    faults: Iterable[Sequence[Any]] = (),
) -> Partial:
    """Return the sums of one task: latents [rows, C, ...] as stored, valid [rows].

    faults: (row, key, stage, reason) of the rows that are not valid.
    """
    name = "z" if "z" in latents else "mu"
    mu = latents[name][valid]
    num_channels = mu.shape[1]
    total = np.zeros(num_channels)
    count = 0
    for chunk in _chunks(mu):
        total += chunk.sum(axis=0)
        count += len(chunk)
    sigma2 = _sigma2_total(latents["logvar"][valid]) if "logvar" in latents else None
    axes = (0, *range(2, mu.ndim))
    return Partial(
        field=name,
        rows=len(mu),
        not_finite=sum(stage == NOT_FINITE for _, _, stage, _ in faults),
        count=count,
        total=total.tolist(),
        moment=_moment(mu, total / max(count, 1)),
        low=mu.min(axis=axes).astype(np.float64).tolist() if count else [],
        high=mu.max(axis=axes).astype(np.float64).tolist() if count else [],
        sigma2_total=sigma2,
    )


def _chunks(values: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    """Yield [m, C] pieces in row order, then position order, in float64.

    numpy adds the rows of a C-ordered [m, C] array one by one, in a fixed order.
    """
    rows_at_once = max(1, _CHUNK_VALUES // max(1, values[:1].size))
    for lo in range(0, len(values), rows_at_once):
        piece = values[lo : lo + rows_at_once]
        flat = piece.reshape(len(piece), values.shape[1], -1).transpose(0, 2, 1)
        yield np.ascontiguousarray(flat, np.float64).reshape(-1, values.shape[1])


def _moment(mu: NDArray[Any], mean: NDArray[np.float64]) -> list[list[float]]:
    num_channels = len(mean)
    full = has_covariance(num_channels)
    widths = [num_channels - i if full else 1 for i in range(num_channels)]
    sums = [np.zeros(width) for width in widths]
    for chunk in _chunks(mu):
        centred = chunk - mean
        for i, width in enumerate(widths):
            sums[i] += (centred[:, i : i + 1] * centred[:, i : i + width]).sum(axis=0)
    return [line.tolist() for line in sums]


def _sigma2_total(logvar: NDArray[Any]) -> list[float]:
    total = np.zeros(logvar.shape[1])
    for chunk in _chunks(logvar):
        total += portable_exp(chunk).sum(axis=0)
    return total.tolist()


def to_json(partial: Partial) -> dict[str, Any]:
    """Return the partial as JSON values, which keep every bit of a float."""
    return asdict(partial)


def merge(partials: Sequence[Partial]) -> dict[str, Any]:
    """Return the statistics of all tasks, the content of `latent_stats.json`.

    Var(z) of a sampled latent z = mu + sigma eps is Var(mu) + E[sigma^2] (law of total variance).
    """
    not_finite = sum(partial.not_finite for partial in partials)
    parts = [partial for partial in partials if partial.count]
    if not parts:
        return {"num_rows": 0, "num_rows_not_finite": not_finite}
    count = sum(part.count for part in parts)
    channels = range(len(parts[0].total))
    mean = [math.fsum(part.total[i] for part in parts) / count for i in channels]
    moment = _merged_moment(parts, mean)
    variance = [max(line[0], 0.0) / count for line in moment]
    sigma2 = _merged_sigma2(parts, count)
    of_z = variance if sigma2 is None else [v + s for v, s in zip(variance, sigma2, strict=True)]
    grand_mean = math.fsum(mean) / len(mean)
    between = math.fsum((m - grand_mean) ** 2 for m in mean) / len(mean)
    grand_variance = math.fsum(variance) / len(mean) + between
    grand_sigma2 = None if sigma2 is None else math.fsum(sigma2) / len(mean)
    std_of_z = math.sqrt(grand_variance + (grand_sigma2 or 0.0))
    return {
        "num_rows": sum(part.rows for part in parts),
        "num_rows_not_finite": not_finite,
        "num_values_per_channel": count,
        # The names of diffusers' AutoencoderKL; a latent is normalised as
        # (z - shift_factor) * scaling_factor, or per channel by latents_mean and latents_std.
        "latents_mean": mean,
        "latents_std": [math.sqrt(v) for v in of_z],
        "shift_factor": grand_mean,
        "scaling_factor": 1 / std_of_z if std_of_z > 0 else None,
        parts[0].field: {
            "mean": mean,
            "std": [math.sqrt(v) for v in variance],
            "min": [min(part.low[i] for part in parts) for i in channels],
            "max": [max(part.high[i] for part in parts) for i in channels],
            "covariance": _covariance(moment, count),
            "global": {
                "mean": grand_mean,
                "std": math.sqrt(grand_variance),
                "min": min(min(part.low) for part in parts),
                "max": max(max(part.high) for part in parts),
            },
        },
        "sigma2_mean": None if sigma2 is None else {"channel": sigma2, "global": grand_sigma2},
        "active_units": _active_units(variance) if parts[0].field == "mu" else None,
    }


def _active_units(variance: Sequence[float]) -> dict[str, Any]:
    count = sum(value > ACTIVE_VARIANCE for value in variance)
    return {"count": count, "min_variance": ACTIVE_VARIANCE}


def _merged_moment(parts: Sequence[Partial], mean: list[float]) -> list[list[float]]:
    """Return the upper triangle of the sum of (mu - mean)(mu - mean)^T about the common mean."""

    def entry(i: int, offset: int) -> float:
        j = i + offset
        within = (part.moment[i][offset] for part in parts)
        between = (
            part.count
            * (part.total[i] / part.count - mean[i])
            * (part.total[j] / part.count - mean[j])
            for part in parts
        )
        return math.fsum([*within, *between])

    return [[entry(i, k) for k in range(len(line))] for i, line in enumerate(parts[0].moment)]


def _merged_sigma2(parts: Sequence[Partial], count: int) -> list[float] | None:
    totals = [part.sigma2_total for part in parts if part.sigma2_total is not None]
    if not totals:
        return None
    return [math.fsum(column) / count for column in zip(*totals, strict=True)]


def _covariance(moment: list[list[float]], count: int) -> list[list[float]] | None:
    if not has_covariance(len(moment)):
        return None
    size = range(len(moment))
    return [[moment[min(i, j)][abs(i - j)] / count for j in size] for i in size]


# The names of diffusers' AutoencoderKL.
SCALING = ("latents_mean", "latents_std", "shift_factor", "scaling_factor")


def scaling(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the factors that normalise latents; None without a valid row."""
    return {name: statistics.get(name) for name in SCALING}


def to_text(statistics: Mapping[str, Any]) -> bytes:
    """Return `latent_stats.json`: readable, one channel list per line."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in statistics.items()]
    return ("{\n  " + ",\n  ".join(lines) + "\n}\n").encode()
