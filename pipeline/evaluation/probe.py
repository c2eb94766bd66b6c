"""How much of what is known about a sample can be read off its latent, linearly or by neighbours.

    features [N, D], targets -> per target: linear and k-nearest-neighbour score on held-out samples

Classes are scored by accuracy (beside chance: the share of the commonest class), numbers by R2, the
share of their variance that is explained. The same probe on raw pixels says what a score is worth.
A hash of the key decides which samples train the probe and which test it.
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
# Of the logistic regression, whose loss is a sum over samples: a few latents hardly notice it, and
# thousands of separable pixels converge.
INVERSE_PENALTY = 0.1
RIDGE_PENALTY = 0.01  # per training sample
MIN_SAMPLES = 40
MIN_SAMPLES_PER_CLASS = 2

Kind = Literal["class", "number"]
# scikit-learn ships no type stubs; its estimators meet only `_score`.
Estimator = Any


@dataclass(frozen=True)
class Score:
    """One target's result from one kind of features."""

    target: str
    features: str  # "latents" or "pixels"
    kind: Kind
    linear: float  # accuracy, or R2
    neighbours: float
    chance: float  # accuracy of the commonest class; 0 for R2
    num_train: int
    num_test: int


def is_test_key(key: str) -> bool:
    """Tell whether a sample tests the probe (a quarter does); the same in every probe."""
    digest = hashlib.blake2b(f"probe-v1/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < TEST_FRACTION * 2**64


def target_kind(values: NDArray[Any]) -> Kind:
    """Say how a target is scored: floats are numbers, everything else names a class."""
    return "number" if values.dtype.kind == "f" else "class"


def probe_features(
    features: NDArray[np.floating[Any]],
    keys: Sequence[str],
    targets: Mapping[str, NDArray[Any]],
    *,
    name: str,
) -> list[Score]:
    """Probe features [N, D] for every target [N]; `name` says what the features are.

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
    """Fit on the training samples and score on the others: accuracy or R2, scikit-learn's own."""
    estimator.fit(features[~test], values[~test])
    return float(estimator.score(features[test], values[test]))


def _scaled(features: NDArray[Any], train: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Centre every feature, and divide all by one number: the training samples' standard deviation.

    A scale of its own for each feature would blow up the pixels that are nearly always black, and
    the latents that a rate term has switched off.
    """
    # In single precision the normal equations of thousands of pixels are ill-conditioned.
    centred = features.astype(np.float64) - features[train].mean(axis=0, dtype=np.float64)
    return centred / (centred[train].std() or 1.0)
