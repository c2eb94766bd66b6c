"""The split of a sample: a hash of its group, so samples keep their split when data is added.

key (or a field of the sample's JSON) --group--> hash in [0, 1) --fractions--> split
pattern of shard names, such as val-* or val-{00..31}.tar ---> all samples of these shards
"""

import hashlib
import json
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipeline.common.component import Component
from pipeline.common.errors import UserError
from pipeline.common.files import canonical_json
from pipeline.data.storage.patterns import expand

ALL = "all"  # the split that every index has: each row
NAME = re.compile(r"[a-z][a-z0-9_]*")
Fraction = Annotated[float, Field(gt=0, le=1)]


class SplitSpec(Component):
    """Fractions of the groups per split. `by`: "key", or "json.FIELD" for groups of samples."""

    by: Annotated[str, Field(pattern=r"^(key|json\..+)$")] = "key"
    fractions: dict[str, Fraction] = Field(default={"train": 0.98, "held_out": 0.02})
    seed: int = 0

    @model_validator(mode="after")
    def _fractions_are_complete(self) -> Self:
        for name in self.fractions:
            if name == ALL or NAME.fullmatch(name) is None:
                raise ValueError(f"{name!r} is no name for a split: use a-z, 0-9, _, and not `all`")
        total = sum(self.fractions.values())
        if abs(total - 1) > 1e-9:
            raise ValueError(f"the fractions {self.fractions} sum to {total}, not to 1")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The splits' names in alphabetical order, which their numbers follow."""
        return tuple(sorted(self.fractions))

    @property
    def json_field(self) -> str | None:
        """The field of the sample's JSON that is its group, dots lead into objects; None = key."""
        return None if self.by == "key" else self.by.removeprefix("json.")

    def digest(self) -> str:
        """Hex identity of the rule; the sequence of the fractions does not matter."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()

    def number_of(self, group: str) -> int:
        """The number of the split that a group falls into."""
        text = f"split-v1/{self.seed}/{group}".encode()
        word = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        bound = 0.0
        for number, name in enumerate(self.names):
            bound += self.fractions[name]
            if word < bound * 2**64:
                return number
        return len(self.fractions) - 1  # the sum may be below 1 by a rounding error


def is_pattern(split: str) -> bool:
    """Whether a split is a pattern of shard names: it contains `*` or braces."""
    return "*" in split or "{" in split


def shards_matching(pattern: str, names: Sequence[str]) -> NDArray[np.bool_]:
    """Return which shards [n] a pattern names; raise UserError for bad braces.

    names: relative to the root; `*` stands for any characters, slashes included.
    """
    texts = expand(pattern)
    exact = {text for text in texts if "*" not in text}
    globs = [text for text in texts if "*" in text]
    return np.array([n in exact or any(fnmatchcase(n, g) for g in globs) for n in names], bool)


def group_of(metadata: bytes, field: str, where: str) -> str:
    """Take the group from a sample's JSON member; raise UserError naming `where` without it."""
    try:
        value: Any = json.loads(metadata)
        for part in field.split("."):
            value = value[part]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{where}: the JSON member has no field {field!r}, by which the split is made."
        ) from None
    return value if isinstance(value, str) else canonical_json(value).decode()
