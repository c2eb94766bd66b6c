"""Sprites: grey 64 x 64 pictures of one white shape, drawn from five known factors.

(seed, number) -> factors: shape (square, ellipse, heart), scale, rotation, x, y -> coverage of each
pixel -> PNG. The factors are those of dSprites (Matthey et al. 2017), but continuous: a probe from
latents to a factor then has a target of full resolution. Every sample is a pure function of (seed,
number), so any process can draw any part of the data set.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.data.pack.sources.base import Broken, PackSource, Sample, encode_png, require_positive

SHAPES = ("square", "ellipse", "heart")  # the label of a sample is the index here
SIZE_PX = 64
RADIUS_PX = 13.0  # unit of length of a shape at scale 1; the farthest point of any lies at 1.14
MARGIN_PX = 16.0  # the centre keeps this distance from the edge, so no shape is ever cut
SCALES = (0.5, 1.0)

_WINDOW_PX = 32  # a square around the centre that holds every shape; only this is drawn
_SUBPIXELS = 4  # per axis: a pixel's value is its share of 4 x 4 points inside the shape
_RANDOMS = 8  # 64-bit numbers reserved per sample, two Philox blocks; five are used
_CHUNK = 64  # samples per call, so that their points fit into the cache
_SAMPLE_BYTES = 2048  # about what one sample takes in a tar


@dataclass(frozen=True)
class Factors:
    """The ground truth of n samples, one array of length n per factor."""

    shape: NDArray[np.int64]  # index into SHAPES
    scale: NDArray[np.float64]  # SCALES
    rotation: NDArray[np.float64]  # radians, [0, 2 pi)
    x: NDArray[np.float64]  # [0, 1], left to right
    y: NDArray[np.float64]  # [0, 1], top to bottom


def draw_factors(seed: int, lo: int, hi: int) -> Factors:
    """Return the factors of samples lo..hi-1: independent and uniform, rounded to 6 decimals.

    The images are drawn from the rounded numbers, so the JSON holds the exact factors.
    """
    key = hashlib.blake2b(f"sprites/{seed}".encode(), digest_size=16).digest()
    blocks = _RANDOMS // 4  # Philox yields four numbers per counter value
    stream = np.random.Philox(key=np.frombuffer(key, "<u8"), counter=lo * blocks)
    raw = stream.random_raw((hi - lo) * _RANDOMS).reshape(-1, _RANDOMS)
    unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    smallest, largest = SCALES
    return Factors(
        shape=(unit[:, 0] * len(SHAPES)).astype(np.int64),
        scale=np.round(smallest + (largest - smallest) * unit[:, 1], 6),
        rotation=np.round(2 * np.pi * unit[:, 2], 6),
        x=np.round(unit[:, 3], 6),
        y=np.round(unit[:, 4], 6),
    )


def inside(shape: int, u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell which points lie inside a shape; u, v are its own axes in units of its radius."""
    if shape == 0:
        return (np.abs(u) < 0.8) & (np.abs(v) < 0.8)
    if shape == 1:
        return (u / np.float32(1.1)) ** 2 + (v / np.float32(0.6)) ** 2 < 1
    # The heart curve (p^2 + q^2 - 1)^3 = p^2 q^3, point down; v grows downwards on the screen.
    p, q = u / np.float32(0.8), -v / np.float32(0.8)
    squared = p * p
    ring = squared + q * q - 1
    return ring * ring * ring < squared * q * q * q


def draw_images(factors: Factors) -> NDArray[np.uint8]:
    """Return the pictures [n, 64, 64], antialiased: 255 * share of the pixel that is covered."""
    images = np.zeros((len(factors.shape), SIZE_PX, SIZE_PX), np.uint8)
    for shape in range(len(SHAPES)):
        members = np.flatnonzero(factors.shape == shape)
        for lo in range(0, len(members), _CHUNK):
            _draw(shape, members[lo : lo + _CHUNK], factors, images)
    return images


def _draw(
    shape: int, members: NDArray[np.int64], factors: Factors, images: NDArray[np.uint8]
) -> None:
    """Draw samples that share a shape into their slots of `images`."""
    span = SIZE_PX - 2 * MARGIN_PX
    centre_x = MARGIN_PX + span * factors.x[members]
    centre_y = MARGIN_PX + span * factors.y[members]
    left = np.floor(centre_x).astype(np.int64) - _WINDOW_PX // 2
    top = np.floor(centre_y).astype(np.int64) - _WINDOW_PX // 2
    points = (np.arange(_WINDOW_PX * _SUBPIXELS) + 0.5) / _SUBPIXELS
    unit = RADIUS_PX * factors.scale[members, None]
    dx = (left[:, None] + points - centre_x[:, None]) / unit
    dy = (top[:, None] + points - centre_y[:, None]) / unit
    cosine = np.cos(factors.rotation[members])[:, None]
    sine = np.sin(factors.rotation[members])[:, None]
    # Rotate every point into the shape's axes: [n, rows, columns] from sums over two axes.
    u = _outer_sum(-sine * dy, cosine * dx)
    v = _outer_sum(cosine * dy, sine * dx)
    values = np.round(np.arange(_SUBPIXELS**2 + 1) * (255 / _SUBPIXELS**2)).astype(np.uint8)
    drawn = values[_count_hits(inside(shape, u, v))]
    for index, number in enumerate(members):
        row, column = top[index], left[index]
        images[number, row : row + _WINDOW_PX, column : column + _WINDOW_PX] = drawn[index]


def _outer_sum(rows: NDArray[np.float64], columns: NDArray[np.float64]) -> NDArray[np.float32]:
    return rows.astype(np.float32)[:, :, None] + columns.astype(np.float32)[:, None, :]


def _count_hits(hits: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Count each pixel's subpixels inside the shape; at most 16, so uint8 holds it."""
    counts = hits.view(np.uint8)
    counts = np.add.reduce([counts[:, :, k::_SUBPIXELS] for k in range(_SUBPIXELS)], dtype=np.uint8)
    return np.add.reduce([counts[:, k::_SUBPIXELS] for k in range(_SUBPIXELS)], dtype=np.uint8)


@dataclass(frozen=True)
class SpritesPart:
    """Samples lo..hi-1 of the data set of one seed."""

    seed: int
    lo: int
    hi: int

    def read(self) -> Iterator[Sample | Broken]:
        """Yield the samples: `.png`, `.cls` (shape) and `.json` (all factors)."""
        factors = draw_factors(self.seed, self.lo, self.hi)
        for index, image in enumerate(draw_images(factors)):
            shape = int(factors.shape[index])
            truth = {
                "shape": shape,
                "scale": float(factors.scale[index]),
                "rotation": float(factors.rotation[index]),
                "x": float(factors.x[index]),
                "y": float(factors.y[index]),
            }
            members = {
                "png": encode_png(image),
                "cls": str(shape).encode(),
                "json": json.dumps(truth).encode(),
            }
            yield Sample(f"{self.lo + index:09d}", members)


@dataclass(frozen=True)
class SpritesSamples:
    """`count` sprites of one seed, keys 000000000, 000000001, ..."""

    count: int
    seed: int

    @property
    def ignored(self) -> Mapping[str, int]:
        """Empty: every sample is drawn."""
        return {}

    def __len__(self) -> int:
        return self.count

    def sizes(self) -> Sequence[int]:
        """Return one size for all, so that their number alone determines the shards."""
        return [_SAMPLE_BYTES] * self.count

    def identity(self) -> Mapping[str, Any]:
        """Return count and seed; the drawing itself is versioned."""
        return {"kind": "sprites", "version": 1, "count": self.count, "seed": self.seed}

    def sidecars(self) -> Mapping[str, bytes]:
        """Return `classes.json`, the names of the labels."""
        return {"classes.json": (json.dumps(SHAPES) + "\n").encode()}

    def part(self, lo: int, hi: int) -> SpritesPart:
        """Return samples lo..hi-1."""
        return SpritesPart(self.seed, lo, hi)


class Sprites(PackSource):
    """The built-in data set: grey 64 x 64 pictures with known factors."""

    HELP: ClassVar[str] = "the built-in sprites with known factors"
    MAX_SHARD_SAMPLES: ClassVar[int] = 1_000

    kind: Literal["sprites"] = "sprites"
    count: int = Field(default=10_000, description="images (%(default)s)")
    seed: int = Field(default=0, description="(%(default)s)")

    def open(self) -> SpritesSamples:
        """Return the samples; they are drawn when they are read."""
        require_positive(count=self.count)
        return SpritesSamples(self.count, self.seed)
