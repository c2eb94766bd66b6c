"""500 files as people have them, in a tar: each is delivered, or counted by its reason."""

import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.decode import DecodeError, ImageDecode
from pipeline.data.decode.codecs import PixelRules, full_scale, read_pixels
from pipeline.data.index import build_index
from tests.data.awkward_tars import Truth, write_tar

SEED = int(os.environ.get("AWKWARD_SEED", "0"))
COUNT = 500
RULES = PixelRules(3, ImageDecode().background, ImageDecode().max_pixels)
LEVELS = 2

Delivered = list[tuple[str, dict[str, bytes]]]


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    print("seed", SEED)
    path = tmp_path_factory.mktemp("awkward") / "a.tar"
    return path.parent, write_tar(path, SEED, COUNT)


@pytest.fixture(scope="module")
def delivered(tar: tuple[Path, Truth]) -> tuple[Delivered, dict[str, int], dict[str, int]]:
    """Samples, counts by reason, labels by key: as the index has them."""
    folder, _ = tar
    index, data = build_index(folder, deep=True), (folder / "a.tar").read_bytes()
    assert index.damage == []
    table = index.table(0)
    samples = [
        (sample.key, {name: data[at : at + n] for name, (at, n) in sample.members.items()})
        for sample in table.samples()
    ]
    labels = dict(zip(table.keys(), table.labels.tolist(), strict=True))
    return samples, {name: found["count"] for name, found in index.left_out.items()}, labels


def test_every_member_is_delivered_or_counted(
    tar: tuple[Path, Truth], delivered: tuple[Delivered, dict[str, int], dict[str, int]]
):
    _, truth = tar
    samples, counts, labels = delivered
    assert samples == truth.samples
    assert counts == truth.left_out + truth.kept
    num_left_out = sum(n for reason, n in counts.items() if reason not in truth.kept)
    num_delivered = sum(len(members) for _, members in samples)
    assert num_delivered + num_left_out == truth.num_members > 2 * COUNT
    assert {key: label for key, label in labels.items() if label != -1} == truth.labels


def test_pixels_are_pillows_or_the_file_is_refused(
    tar: tuple[Path, Truth], delivered: tuple[Delivered, dict[str, int], dict[str, int]]
):
    _, truth = tar
    contents = dict(delivered[0])
    num_refused = 0
    for key, image in truth.images.items():
        content = next(c for name, c in contents[key].items() if c == image.content or "." in name)
        if image.expected is None:
            num_refused += 1
            with pytest.raises(DecodeError):
                read_pixels(content, RULES, full_scale)
            continue
        found = read_pixels(content, RULES, full_scale).astype(np.int16)
        assert found.shape == image.expected.shape, (image.name, image.why)
        worst = np.abs(found - image.expected).max()
        assert worst <= LEVELS, (image.name, image.why, worst)
    assert COUNT / 10 < num_refused < COUNT / 2
