"""The members that are thrown away again, and where each would stand."""

from pathlib import Path
from typing import NamedTuple

from tests.house import House

MEMBERS = Path(__file__).parent / "members"


class Door(NamedTuple):
    """How a member comes in: its file, and its name in its family's file."""

    member: str
    folder: str
    edits: tuple[tuple[str, str], ...]  # text that stands once in the family's file -> its new form


def _door(member: str, folder: str, before: str, name: str, union: str) -> Door:
    line = f"from {folder.replace('/', '.')}.{member} import {name}\n"
    return Door(
        member,
        folder,
        ((before, line + before), (f"{union} = Annotated[", f"{union} = Annotated[{name} | ")),
    )


TERMS, KL = "pipeline/losses/terms", "from pipeline.losses.terms.kl import"
METRICS, ERROR = "pipeline/metrics", "from pipeline.metrics.squared_error import"
BOTTLENECKS, GAUSSIAN = "pipeline/models/bottlenecks", "from pipeline.models.bottlenecks.gaussian"
TRANSFORMS = "pipeline/corruptions/latents"
DOORS = (
    _door("edges", TERMS, KL, "Edges", "Term"),
    _door("spread", TERMS, KL, "Spread", "Term"),
    _door("duel", TERMS, KL, "Duel", "Term"),
    _door("covariance", METRICS, ERROR, "Covariance", "Metric"),
    _door("median", METRICS, ERROR, "Median", "Metric"),
    _door("codebook", BOTTLENECKS, GAUSSIAN, "Codebook", "Bottleneck"),
    Door(
        "mirror",
        TRANSFORMS,
        (
            (
                "import LatentTransformBase\n",
                "import LatentTransformBase\n"
                "from pipeline.corruptions.latents.mirror import Mirror\n",
            ),
            ("LatentTransforms = tuple[()]", "LatentTransforms = tuple[Mirror, ...]"),
        ),
    ),
)


def enter(house: House, door: Door) -> tuple[list[str], list[str]]:
    """Add a member; return the files that are new, and those that changed."""
    house.write(f"{door.folder}/{door.member}.py", (MEMBERS / f"{door.member}.py").read_text())
    for old, new in door.edits:
        house.replace(f"{door.folder}/__init__.py", old, new)
    return house.touched()
