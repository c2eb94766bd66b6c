"""Probes: how well targets can be predicted from latents, linearly or by nearest neighbours.

features [N, D], targets -> per target: linear and k-nearest-neighbour score on held-out samples

Classes are scored by accuracy (chance: the share of the most frequent class), numbers by R2, the
explained share of their variance. The same probe on raw pixels is the baseline. A hash of the key
decides which samples train the probe and which test it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from pipeline.common.errors import UserError

TEST_FRACTION = 0.25
NUM_NEIGHBOURS = 10
# Of the logistic regression, whose loss is a sum over samples: weak enough for a few latents, and
# strong enough for thousands of separable pixels to converge.
INVERSE_PENALTY = 0.1
RIDGE_PENALTY = 0.01  # per training sample
MIN_SAMPLES = 40
MIN_SAMPLES_PER_CLASS = 2

Kind = Literal["class", "number"]
# scikit-learn has no type stubs.
Estimator = Any


@dataclass(frozen=True)
class Score:
    """The result of one target and one kind of features."""

    target: str
    features: str  # "latents" or "pixels"
    kind: Kind
    linear: float  # accuracy, or R2
    neighbours: float
    chance: float  # accuracy of the commonest class; 0 for R2
    num_train: int
    num_test: int


def is_test_key(key: str) -> bool:
    """Return whether a sample is one of the quarter that tests every probe."""
    digest = hashlib.blake2b(f"probe-v1/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < TEST_FRACTION * 2**64


def target_kind(values: NDArray[Any]) -> Kind:
    """Return how a target is scored: floats as numbers, everything else as classes."""
    return "number" if values.dtype.kind == "f" else "class"


def probe_features(
    features: NDArray[np.floating[Any]],
    keys: Sequence[str],
    targets: Mapping[str, NDArray[Any]],
    *,
    name: str,
) -> list[Score]:
    """Probe features [N, D] for every target [N]; `name`: of the features.

    Raises UserError if there are too few samples to split, or a target with one value only.
    """
    test = np.array([is_test_key(key) for key in keys])
    if len(keys) < MIN_SAMPLES or not test.any() or test.all():
        raise UserError(
            f"a probe needs at least {MIN_SAMPLES} samples to train and test on, but there are "
            f"{len(keys)}"
        )
    scaled = _scaled(features, ~test)
    return [_probe_one(scaled, values, test, target, name) for target, values in targets.items()]


def _probe_one(
    features: NDArray[Any], values: NDArray[Any], test: NDArray[np.bool_], target: str, name: str
) -> Score:
    kind = target_kind(values)
    if len(np.unique(values[~test])) < MIN_SAMPLES_PER_CLASS:
        raise UserError(f"the target {target} has one value only: there is nothing to predict")
    linear: Estimator
    neighbours: Estimator
    if kind == "class":
        linear = LogisticRegression(C=INVERSE_PENALTY, tol=1e-3, max_iter=1000)
        neighbours = KNeighborsClassifier(NUM_NEIGHBOURS)
        _, counts = np.unique(values[test], return_counts=True)
        chance = float(counts.max() / counts.sum())
    else:
        linear = Ridge(alpha=RIDGE_PENALTY * float((~test).sum()))
        neighbours = KNeighborsRegressor(NUM_NEIGHBOURS)
        chance = 0.0
    scores = [_score(estimator, features, values, test) for estimator in (linear, neighbours)]
    return Score(
        target, name, kind, scores[0], scores[1], chance, int((~test).sum()), int(test.sum())
    )


def _score(
    estimator: Estimator, features: NDArray[Any], values: NDArray[Any], test: NDArray[np.bool_]
) -> float:
    """Fit on the training samples; return accuracy or R2 on the test samples, by scikit-learn."""
    estimator.fit(features[~test], values[~test])
    return float(estimator.score(features[test], values[test]))


def _scaled(features: NDArray[Any], train: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Centre every feature; divide all by one standard deviation, of the training samples.

    A scale per feature would amplify pixels that are nearly always black, and latents that a rate
    term has switched off.
    """
    # In single precision the normal equations of thousands of pixels are ill-conditioned.
    centred = features.astype(np.float64) - features[train].mean(axis=0, dtype=np.float64)
    return centred / (centred[train].std() or 1.0)
