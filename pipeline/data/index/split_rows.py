"""The rows of a split: by name, or all rows of the shards that a pattern names.

manifest's counts per shard + split --> number in the tables, counts [shards], identity
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.common.files import canonical_json
from pipeline.data.index.scan import ShardEntry
from pipeline.data.index.splits import ALL, SplitSpec, is_pattern, shards_matching

NUM_SHOWN = 3
SHARDS = "shards:"  # begins the identity of a pattern; no name of a split has a colon


def identity_of_shards(names: Iterable[str]) -> str:
    """Identity of all samples of some shards that have samples."""
    return f"{SHARDS}{hashlib.sha256(canonical_json(sorted(names))).hexdigest()}"


class SplitRows:
    """The splits of one index."""

    def __init__(self, path: Path | str, spec: SplitSpec, shards: Sequence[ShardEntry]) -> None:
        """path: of the index, for messages."""
        self._path, self._spec, self._shards = path, spec, shards
        self._matching = lru_cache(maxsize=8)(self._find_matching)

    @cached_property
    def digest(self) -> str:
        """Identity of the rule that divides the samples."""
        return self._spec.digest()

    def check(self, split: str, setting: str = "data.split") -> None:
        """Raise UserError, naming the setting, for an unknown split or a pattern of no shard."""
        if is_pattern(split):
            if not self._matching(split).any():
                shown = ", ".join(shard.name for shard in self._shards[:NUM_SHOWN])
                raise UserError(
                    f"{setting} = {split!r} matches none of the {len(self._shards):,} shards of "
                    f"{self._path}, such as {shown}."
                )
        elif split not in (*self._spec.names, ALL):
            known = ", ".join((*self._spec.names, ALL))
            raise UserError(
                f"{setting} = {split!r}: the index has the splits {known} ({self._path}). A "
                "pattern of shard names, as val-*, stands for the samples of these shards."
            )

    def number(self, split: str) -> int | None:
        """The number of a split in the tables; None: all rows of the shards with counts."""
        return None if split == ALL or is_pattern(split) else self._spec.names.index(split)

    def identity(self, split: str) -> str:
        """Identity of a split's rows: name and rule, digest of the names of shards, or `all`."""
        if is_pattern(split):
            pairs = zip(self._shards, self.counts(split).tolist(), strict=True)
            return identity_of_shards(shard.name for shard, count in pairs if count)
        return ALL if split == ALL else f"{split}/{self.digest}"

    def counts(self, split: str) -> NDArray[np.int64]:
        """Rows of a split in each shard."""
        if self.number(split) is not None:
            return np.array([shard.splits[split] for shard in self._shards], np.int64)
        counts = np.array([shard.samples for shard in self._shards], np.int64)
        return counts * self._matching(split) if is_pattern(split) else counts

    def _find_matching(self, pattern: str) -> NDArray[np.bool_]:
        return shards_matching(pattern, [shard.name for shard in self._shards])
