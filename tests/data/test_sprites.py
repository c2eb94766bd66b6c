"""Sprites: pure functions of (seed, number), drawn as a slow reference draws them."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from pipeline.data.pack.sources.sprites import (
    MARGIN_PX,
    RADIUS_PX,
    SHAPES,
    SIZE_PX,
    Factors,
    SpritesPart,
    draw_factors,
    draw_images,
)


def inside_reference(shape: str, u: float, v: float) -> bool:
    if shape == "square":
        return abs(u) < 0.8 and abs(v) < 0.8
    if shape == "ellipse":
        return (u / 1.1) ** 2 + (v / 0.6) ** 2 < 1
    p, q = u / 0.8, -v / 0.8
    return (p**2 + q**2 - 1) ** 3 < p**2 * q**3


def draw_reference(factors: Factors, n: int) -> np.ndarray:
    """Count, one by one, which of the 4 x 4 points of every pixel lie inside."""
    span = SIZE_PX - 2 * MARGIN_PX
    centre_x, centre_y = MARGIN_PX + span * factors.x[n], MARGIN_PX + span * factors.y[n]
    cosine, sine = np.cos(factors.rotation[n]), np.sin(factors.rotation[n])
    radius, shape = RADIUS_PX * factors.scale[n], SHAPES[factors.shape[n]]
    image = np.zeros((SIZE_PX, SIZE_PX))
    for row in range(4 * SIZE_PX):
        for column in range(4 * SIZE_PX):
            dx, dy = (column + 0.5) / 4 - centre_x, (row + 0.5) / 4 - centre_y
            u, v = (cosine * dx - sine * dy) / radius, (sine * dx + cosine * dy) / radius
            image[row // 4, column // 4] += inside_reference(shape, u, v)
    return np.round(image * 255 / 16)


def test_drawing_agrees_with_the_slow_reference():
    factors = draw_factors(1, 0, 6)
    assert set(factors.shape) == {0, 1, 2}
    images = draw_images(factors)
    for n in range(6):
        difference = np.abs(images[n] - draw_reference(factors, n))
        assert difference.max() <= 16  # one point of 16, where float32 decides a tie otherwise
        assert (difference > 0).sum() <= 2


def test_any_stretch_is_the_same():
    whole = draw_factors(7, 0, 100)
    part = draw_factors(7, 33, 41)
    for name in ("shape", "scale", "rotation", "x", "y"):
        np.testing.assert_array_equal(getattr(whole, name)[33:41], getattr(part, name))
    np.testing.assert_array_equal(draw_images(whole)[33:41], draw_images(part))
    samples = list(SpritesPart(7, 0, 12).read())
    assert list(SpritesPart(7, 5, 8).read()) == samples[5:8]


def test_seeds_differ():
    assert (draw_factors(0, 0, 50).x != draw_factors(1, 0, 50).x).all()


def test_factors_are_uniform_and_independent():
    factors = draw_factors(0, 0, 20_000)
    columns = np.stack(
        [
            factors.shape / 3 + 1 / 6,  # bin centres
            2 * factors.scale - 1,
            factors.rotation / (2 * np.pi),
            factors.x,
            factors.y,
        ]
    )
    np.testing.assert_allclose(columns.mean(axis=1), 0.5, atol=0.01)
    np.testing.assert_allclose(columns[1:].var(axis=1), 1 / 12, atol=0.002)
    np.testing.assert_allclose(np.corrcoef(columns), np.eye(5), atol=0.03)
    assert np.bincount(factors.shape).min() > 6_300
    assert columns[1:].min() >= 0
    assert columns[1:].max() <= 1


@pytest.mark.parametrize("shape", range(3))
def test_no_shape_is_cut(shape: int):
    corners = np.array([0.0, 0.0, 1.0, 1.0])
    for rotation in np.linspace(0, 2 * np.pi, 16):
        factors = Factors(
            np.full(4, shape), np.ones(4), np.full(4, rotation), corners, corners[[0, 2, 1, 3]]
        )
        images = draw_images(factors)
        edges = [images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]]
        assert max(edge.max() for edge in edges) == 0
        # The whole shape is there: the same mass wherever the centre is.
        mass = images.reshape(4, -1).sum(axis=1, dtype=np.int64)
        assert np.ptp(mass) <= 0.01 * mass[0]


def test_sample_carries_its_truth():
    (sample,) = SpritesPart(2, 41, 42).read()
    factors = draw_factors(2, 41, 42)
    truth = json.loads(sample.members["json"])
    assert sample.key == "000000041"
    assert set(truth) == {"shape", "scale", "rotation", "x", "y"}
    assert sample.members["cls"] == str(truth["shape"]).encode()
    assert all(truth[name] == getattr(factors, name)[0] for name in truth)
    with Image.open(io.BytesIO(sample.members["png"])) as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), draw_images(factors)[0])
