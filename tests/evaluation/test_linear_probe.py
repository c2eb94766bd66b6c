"""The probe on planted factors: it finds those that are there, and no others."""

import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.evaluation.linear_probe import is_test_key, probe_features, target_kind

N, D = 2000, 8
KEYS = [f"{number:06d}" for number in range(N)]


@pytest.fixture
def rng():
    return np.random.Generator(np.random.Philox(key=5))


def probe_one(features, target):
    [score] = probe_features(features, KEYS, {"t": target}, name="latents")
    return score


def test_a_linear_factor_is_read_off_and_noise_is_not(rng):
    features = rng.normal(size=(N, D))
    planted = features @ rng.normal(size=D) + 3
    score = probe_one(features, planted)
    assert (score.target, score.features, score.kind, score.chance) == ("t", "latents", "number", 0)
    assert score.linear > 0.999
    assert 0.3 < score.neighbours < score.linear
    noise = probe_one(features, rng.normal(size=N))
    assert abs(noise.linear) < 0.05
    assert noise.neighbours < 0.05


def test_r2_is_the_share_of_variance_that_is_explained(rng):
    features = rng.normal(size=(N, D))
    target = features[:, 0] + rng.normal(size=N)  # half of the variance
    assert probe_one(features, target).linear == pytest.approx(0.5, abs=0.07)


def test_scale_and_shift_of_the_features_do_not_matter(rng):
    features = rng.normal(size=(N, D))
    target = features[:, 0] ** 2
    scores = [probe_one(features * scale + shift, target) for scale, shift in ((1, 0), (1e4, 1e5))]
    assert scores[0].linear == pytest.approx(scores[1].linear, abs=1e-6)
    assert scores[0].neighbours == pytest.approx(scores[1].neighbours, abs=1e-3)


def test_neighbours_find_what_no_line_can(rng):
    features = rng.normal(size=(N, 2))
    ring = (np.hypot(*features.T) > 1.2).astype(int)
    score = probe_one(features, ring)
    assert score.neighbours > 0.93
    assert score.linear < score.chance + 0.05


def test_classes_are_scored_beside_chance(rng):
    classes = np.array(["cat", "dog", "eel"])[rng.choice(3, N, p=[0.5, 0.3, 0.2])]
    centres = {"cat": 0.0, "dog": 6.0, "eel": 12.0}
    features = rng.normal(size=(N, D)) + np.array([centres[name] for name in classes])[:, None]
    found = probe_one(features, classes)
    assert found.kind == "class"
    assert found.linear > 0.99
    assert found.neighbours > 0.99
    in_test = classes[[is_test_key(key) for key in KEYS]]
    assert found.chance == np.mean(in_test == "cat")
    assert (found.num_train, found.num_test) == (N - len(in_test), len(in_test))
    unknowable = probe_one(rng.normal(size=(N, D)), classes)
    assert unknowable.linear == pytest.approx(unknowable.chance, abs=0.06)
    assert unknowable.neighbours < unknowable.chance + 0.06


def test_the_key_alone_decides_who_tests():
    testers = [key for key in KEYS if is_test_key(key)]
    assert len(testers) / N == pytest.approx(0.25, abs=0.03)
    assert [key for key in reversed(KEYS) if is_test_key(key)] == testers[::-1]


def test_the_order_of_the_samples_does_not_matter(rng):
    features, order = rng.normal(size=(N, D)), rng.permutation(N)
    target = features[:, 0] + 0.3 * rng.normal(size=N)
    one = probe_one(features, target)
    keys = [KEYS[i] for i in order]
    [other] = probe_features(features[order], keys, {"t": target[order]}, name="latents")
    assert (other.num_train, other.num_test) == (one.num_train, one.num_test)
    assert other.linear == pytest.approx(one.linear, abs=1e-9)
    assert other.neighbours == pytest.approx(one.neighbours, abs=1e-9)


def test_floats_are_numbers_and_all_else_names_classes():
    kinds = {"class": ["a", "b"], "number": [0.5, 1.0]}
    assert all(target_kind(np.array(values)) == kind for kind, values in kinds.items())
    assert target_kind(np.array([1, 2])) == target_kind(np.array([True])) == "class"


def test_too_few_samples_and_a_constant_target_are_errors(rng):
    features = rng.normal(size=(N, D))
    with pytest.raises(UserError, match="at least 40 samples .* there are 39"):
        probe_features(features[:39], KEYS[:39], {"t": features[:39, 0]}, name="latents")
    trainers = [i for i, key in enumerate(KEYS) if not is_test_key(key)][:60]
    keys = [KEYS[i] for i in trainers]
    with pytest.raises(UserError, match="train and test on"):
        probe_features(features[trainers], keys, {"t": features[trainers, 0]}, name="latents")
    with pytest.raises(UserError, match="the target t has one value only"):
        probe_one(features, np.full(N, 7))
