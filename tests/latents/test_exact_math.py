"""The portable functions against math's, in units in the last place."""

import math

import numpy as np
import pytest

from pipeline.latents.exact_math import portable_cos_sin, portable_exp, portable_log

STEP = 2.0**-24  # uniforms are multiples of it


def test_portable_exp_is_exp():
    x = np.concatenate([np.linspace(-25, 25, 100_001), [0.0, 700.0, -700.0]])
    exact = np.array([math.exp(value) for value in x])
    assert (np.abs(portable_exp(x) - exact) <= np.spacing(exact)).all()
    assert portable_exp(np.zeros(1))[0] == 1.0


@pytest.mark.parametrize("x", [math.inf, -math.inf, math.nan])
def test_exp_of_what_is_not_finite_is_no_number(x: float):
    assert np.isnan(portable_exp(np.array([x]))).all()


def test_portable_log_is_log():
    x = np.concatenate([np.arange(1, 1 << 24, 97) * STEP, np.geomspace(1e-300, 1e300, 10_001)])
    exact = np.array([math.log(value) for value in x])
    assert (np.abs(portable_log(x) - exact) <= 3 * np.spacing(np.abs(exact))).all()
    assert portable_log(np.ones(1))[0] == 0.0


def test_portable_cos_and_sin_are_those_of_math():
    turns = np.concatenate([np.arange(0, 1 << 24, 97) * STEP, np.arange(9) / 8])
    cos, sin = portable_cos_sin(turns)
    np.testing.assert_allclose(cos, [math.cos(2 * math.pi * turn) for turn in turns], atol=1e-15)
    np.testing.assert_allclose(sin, [math.sin(2 * math.pi * turn) for turn in turns], atol=1e-15)
    quarters = portable_cos_sin(np.arange(4) / 4)
    assert np.abs(quarters).tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]


def test_length_and_alignment_change_no_bit():
    """As they do in vectorised functions, which treat the ends of an array differently."""
    x = np.random.default_rng(0).uniform(0.01, 0.99, 1001)
    for function in (portable_exp, portable_log, lambda v: np.stack(portable_cos_sin(v), -1)):
        whole = function(x)
        for part in (slice(1, None), slice(3, 4), slice(0, None, 3)):
            np.testing.assert_array_equal(function(x[part]), whole[part])
