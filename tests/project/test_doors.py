"""The doors of the house: a verb, and a source for `latentmill pack`, are one file and one name.

Each is really added to a copy of the tree, by hand as it were, and used from there by commands.
`pytest -s` prints which files that touched.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.house import House, copy_house

VERB = '''
"""`latentmill count-down`: a verb that is thrown away again."""

import argparse

from pipeline.common.arguments import bind
from pipeline.common.console import print_report
from pipeline.common.errors import DONE

HELP = "count down to one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say from where."""
    bind(parser, run)
    parser.add_argument("--start", type=int, default=3, help="number (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Count, and report the path of this file."""
    numbers = list(range(arguments.start, 0, -1))
    print_report({"numbers": numbers, "file": __file__}, arguments.json)
    return DONE
'''

SOURCE = '''
"""Stripes: pictures of one grey each, a source that is thrown away again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.data.pack.sources.base import (
    Broken,
    PackSource,
    Sample,
    encode_png,
    require_positive,
)


@dataclass(frozen=True)
class Greys:
    """Samples lo..hi-1: their number times `step` is their grey."""

    step: int
    lo: int
    hi: int

    @property
    def ignored(self) -> Mapping[str, int]:
        return {}

    def __len__(self) -> int:
        return self.hi - self.lo

    def sizes(self) -> Sequence[int]:
        return [1024] * len(self)

    def identity(self) -> Mapping[str, Any]:
        return {"kind": "stripes", "step": self.step, "count": self.hi}

    def sidecars(self) -> Mapping[str, bytes]:
        return {}

    def part(self, lo: int, hi: int) -> "Greys":
        return Greys(self.step, lo, hi)

    def read(self) -> Iterator[Sample | Broken]:
        for number in range(self.lo, self.hi):
            picture = np.full((8, 8), self.step * number, np.uint8)
            yield Sample(f"{number:03d}", {"png": encode_png(picture)})


class Stripes(PackSource):
    """Pictures of one grey each."""

    HELP: ClassVar[str] = "pictures of one grey each"

    kind: Literal["stripes"] = "stripes"
    step: int = Field(description="from one grey to the next")
    count: int = Field(default=5, description="images (%(default)s)")
    shard_samples: int = Field(default=2, description="at most (%(default)s)")

    def open(self) -> Greys:
        require_positive(step=self.step, count=self.count)
        return Greys(self.step, 0, self.count)
'''


@pytest.fixture
def house(tmp_path: Path) -> House:
    return copy_house(tmp_path / "house")


def greys(shards: Path) -> list[tuple[str, list[int]]]:
    """The names of all members in order, with the values that their pictures have."""
    found: list[tuple[str, list[int]]] = []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                with Image.open(io.BytesIO(file.read())) as image:
                    found.append((member.name, np.unique(np.asarray(image)).tolist()))
    return found


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def test_a_verb_is_one_file_and_one_name(house: House):
    new, names = "pipeline/commands/count_down.py", "pipeline/commands/__init__.py"
    house.write(new, VERB)
    house.insert(
        names,
        ("from pipeline.commands import (\n", "    count_down,\n"),
        ("VERBS: tuple[Verb, ...] = (\n", "    count_down,\n"),
    )

    assert "count-down count down to one" in unwrapped(house.latentmill("--help"))
    shown = house.latentmill("count-down", "--help")
    assert shown.startswith("usage: latentmill count-down [-h] [--json] [--start START]\n")
    assert "Count down to one.\n" in shown
    assert house.latentmill("count-down").startswith("numbers\n  3\n  2\n  1\n")
    printed = json.loads(house.latentmill("count-down", "--start", 2, "--json"))
    assert printed == {"numbers": [2, 1], "file": str(house.root / new)}

    assert house.touched() == ([new], [names])


@pytest.mark.slow
def test_a_source_of_pack_is_one_file_and_one_name(house: House, tmp_path: Path):
    new, names = "pipeline/data/pack/sources/stripes.py", "pipeline/data/pack/sources/__init__.py"
    house.write(new, SOURCE)
    house.insert(
        names,
        (
            "from pipeline.data.pack.sources.sprites import Sprites\n",
            "from pipeline.data.pack.sources.stripes import Stripes\n",
        ),
        ("Source = Annotated[", "Stripes | "),
    )

    listed = unwrapped(house.latentmill("pack", "--help"))
    assert "stripes pictures of one grey each" in listed
    shown = unwrapped(house.latentmill("pack", "stripes", "--help"))
    assert "step from one grey to the next out directory or URL" in shown
    assert "--count COUNT images (5)" in shown

    out = tmp_path / "shards"
    argv = ["pack", "stripes", 10, out, "--workers", 1, "--json"]
    packed = json.loads(house.latentmill(*argv))
    assert (packed["num_samples"], packed["num_shards"], packed["broken"]) == (5, 3, [])
    assert greys(out) == [(f"{number:03d}.png", [10 * number]) for number in range(5)]
    indexed = json.loads(house.latentmill("index", out, "--workers", 1, "--json"))
    assert (indexed["num_samples"], indexed["dataset_id"]) == (5, packed["dataset_id"])

    assert house.touched() == ([new], [names])
