"""The opened index of a data set: counts per split, byte ranges, keys, and the data set's identity.

<path>/index --Index.open--> counts, tables of shards, dataset_id
"""

from collections.abc import Sequence
from contextlib import closing
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.data.index.left_out import (
    DOTTED_SUFFIX,
    MAX_KINDS,
    PICTURE_SUFFIXES,
    REASONS,
    Counts,
    Damage,
    folded,
    lines_of,
    summed,
)
from pipeline.data.index.manifest import (
    INDEX_DIRECTORY,
    MANIFEST,
    IndexFiles,
    entry_from_json,
    without_query,
)
from pipeline.data.index.split_rows import SplitRows
from pipeline.data.index.splits import ALL, SplitSpec
from pipeline.data.index.table import ShardTable
from pipeline.data.storage import (
    RemotePolicy,
    ShardState,
    Storage,
    open_storage,
)
from pipeline.data.storage.patterns import find_shards

MAX_OPEN_TABLES = 1024
ORDINAL_SHIFT = 48  # uid = ordinal * 2^48 + samples before
MAX_TABLES_READ = 100  # to count the samples without a wanted member
NUM_SUFFIXES_SHOWN = 20


States = dict[str, ShardState]  # of the shards of one data set, by name


class Index:
    """The opened index of one data set, local or remote.

    Samples with equal keys (`num_duplicate_keys`) are different samples: each has its own uid, is
    trained on once per epoch and exported as its own row.
    """

    def __init__(self, files: IndexFiles, manifest: dict[str, Any], ordinal: int = 0) -> None:
        self._files = files
        self.ordinal = ordinal  # of the data set among those of a mixture
        self.path = files.path
        self.dataset_id: str = manifest["dataset_id"]
        self.split_spec = SplitSpec(**manifest["split"])
        self.shards = [entry_from_json(entry) for entry in manifest["shards"]]
        self.splits = SplitRows(self.path, self.split_spec, self.shards)
        self.num_duplicate_keys: int = manifest["duplicate_keys"]["count"]
        self.duplicate_keys: list[list[str]] = manifest["duplicate_keys"]["examples"]
        self.suffixes = _by_count(manifest.get("suffixes"))
        self._left_out_beside = manifest.get("left_out", {})
        self._tags_of: str | None = manifest.get("tags_of")
        self.table = lru_cache(maxsize=MAX_OPEN_TABLES)(self._open_table)

    @classmethod
    def open(
        cls, path: Path | str, ordinal: int = 0, remote: RemotePolicy | None = None
    ) -> "Index":
        """Open `<path>/index`; raise UserError if there is none that this version reads.

        `remote`: attempts and limits for a URL; None = the defaults.
        """
        files = IndexFiles(path, remote)
        return cls(files, files.manifest(), ordinal)

    @property
    def num_samples(self) -> int:
        """Total number of samples of all splits."""
        return sum(shard.samples for shard in self.shards)

    @property
    def damage(self) -> list[tuple[str, Damage]]:
        """All damage that the tar reader found, as (shard, damage)."""
        return [(shard.name, damage) for shard in self.shards for damage in shard.damage]

    @cached_property
    def first_uids(self) -> NDArray[np.int64]:
        """The uid of each shard's first row: dataset ordinal * 2^48 + samples in earlier shards."""
        counts = [shard.samples for shard in self.shards]
        return (self.ordinal << ORDINAL_SHIFT) + np.concatenate([[0], np.cumsum(counts)])[:-1]

    def locate(self, uids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(shard, row) of samples by their uids."""
        # If several shards start at the same uid, all but the last are empty.
        shard = np.searchsorted(self.first_uids, uids, side="right") - 1
        return shard, uids - self.first_uids[shard]

    def keys_of(self, uids: NDArray[np.int64]) -> list[str]:
        """Keys of samples by their uids."""
        shards, rows = self.locate(uids)
        keys = [""] * len(uids)
        for shard in np.unique(shards).tolist():
            positions = np.flatnonzero(shards == shard)
            for position, key in zip(
                positions.tolist(), self.table(shard).keys(rows[positions]), strict=True
            ):
                keys[position] = key
        return keys

    def split_number(self, split: str) -> int | None:
        """The number of a split in the tables; None: all rows of the shards that `counts` tells.

        Raises UserError for a split that is not known.
        """
        self.splits.check(split)
        return self.splits.number(split)

    def split_identity(self, split: str) -> str:
        """Identity of a split's rows: name and rule, digest of the names of shards, or `all`."""
        self.splits.check(split)
        return self.splits.identity(split)

    def counts(self, split: str, setting: str = "data.split") -> NDArray[np.int64]:
        """Rows of one split in each shard; raise UserError, naming the setting, if unknown."""
        self.splits.check(split, setting)
        return self.splits.counts(split)

    def samples_per_split(self) -> dict[str, int]:
        """Total number of rows per split."""
        return {name: int(self.counts(name).sum()) for name in self.split_spec.names}

    @property
    def has_checksums(self) -> bool:
        """Whether the CRC-32 of every member of every shard is known (`index --deep`, `pack`)."""
        return all(shard.has_checksums for shard in self.shards)

    @cached_property
    def left_out(self) -> Counts:
        """What does not arrive as a sample, or not whole, by reason."""
        counts = {shard.name: shard.left_out for shard in self.shards}
        return summed(counts | {"": self._left_out_beside})

    def left_out_lines(self, *, only_losses: bool = False) -> list[str]:
        """`left_out` in words; not suffixes with a dot where they are kinds of members."""
        shown = dict(self.left_out)
        known = self.suffixes
        if (
            known is not None
            and len(known) <= MAX_KINDS
            and not known.keys().isdisjoint(PICTURE_SUFFIXES)
        ):
            shown.pop(DOTTED_SUFFIX, None)
        return list(lines_of(shown, only_losses=only_losses))

    def check_suffixes(
        self,
        wanted: Sequence[str],
        max_missing: float = 1.0,
        setting: str = "data.decode.suffixes",
        *,
        split: str = ALL,
    ) -> None:
        """Raise UserError if too few samples have a member with any of the suffixes.

        Too few: none, or surely more than the fraction `max_missing` of a split has none; `setting`
        names the suffixes.
        """
        total = int(self.counts(split).sum())
        allowed = max_missing * total
        missing = self._missing_at_least(wanted, split, total, allowed)
        if (missing <= allowed and missing < total) or total == 0 < self.num_samples:
            return
        lack = f"a member with a suffix of {', '.join(wanted)} ({setting})"
        text = f"No sample of {self.path} has {lack}."
        if missing < total:
            text = (
                f"At least {missing:,} of the {total:,} samples ({100 * missing / total:.3g} %) of "
                f"{self.path} lack {lack}; at most {100 * max_missing:.3g} % may lack it."
            )
        raise UserError(f"{text} {self._suffixes_to_name(wanted, setting)}")

    def _missing_at_least(
        self, wanted: Sequence[str], split: str, total: int, allowed: float
    ) -> int:
        """How many of a split's `total` samples have no wanted member, at least.

        Exact where it matters: by the manifest's counts or, if they do not tell whether more than
        `allowed` miss it, by up to MAX_TABLES_READ tables.
        """
        if self.suffixes is not None:
            found = [self.suffixes.get(suffix, 0) for suffix in wanted]
            least, most = max(total - sum(found), 0), self.num_samples - max(found)
            if least > allowed or least == total or most <= min(allowed, total - 1):
                return least
        missing, number = 0, self.split_number(split)
        for shard in np.flatnonzero(self.counts(split))[:MAX_TABLES_READ].tolist():
            table = self.table(shard)
            missing += int((table.ranges_of(tuple(wanted)).offset[table.rows_of(number)] < 0).sum())
            if missing > allowed:
                break
        return missing

    def _suffixes_to_name(self, wanted: Sequence[str], setting: str) -> str:
        """Members per suffix, and those that look like pictures or arrays and are not wanted."""
        if self.suffixes is None:
            return "The index has very many suffixes: names hold more than one dot."
        shown = list(folded(self.suffixes).items())[:NUM_SUFFIXES_SHOWN]
        known = ", ".join(f"{name} ({count})" for name, count in shown) or "no samples at all"
        others = [
            name
            for name in self.suffixes
            if name not in wanted and name.rpartition(".")[2] in PICTURE_SUFFIXES
        ]
        remedy = f" Name those that are to be read in {setting}." if others else ""
        if len(self.suffixes) > MAX_KINDS and any("." in name for name in others):
            remedy = f" Names have more than one dot: {REASONS[DOTTED_SUFFIX].remedy}."
        return f"The index has: {known}.{remedy}"

    def expected_state(self, shard: int, root: Path | str) -> ShardState:
        """The state that the store of `root` must report; with a tag if `root` was indexed."""
        entry = self.shards[shard]
        return ShardState(entry.bytes, entry.tag if without_query(root) == self._tags_of else None)

    def check_shards(self, shards: Path | str | Storage) -> States:
        """Check every shard; raise UserError naming the first that is missing or has changed.

        `shards`: their root, or the store that will read them, which pins the states seen here.
        Returns the state of each shard, for stores that are opened later (`Storage.expect`).
        """
        with closing(shards if isinstance(shards, Storage) else open_storage(shards)) as storage:
            states = storage.states(shard.name for shard in self.shards)
        sound: States = {}
        for number, shard in enumerate(self.shards):
            state, expected = states[shard.name], self.expected_state(number, storage.root)
            if state is None:
                raise UserError(
                    f"The shard {storage.where(shard.name)} is missing: put it back, or if the "
                    "shards lie elsewhere, name their place (data.shards, or --shards)."
                )
            if state.num_bytes != expected.num_bytes:
                found = f"has {state.num_bytes} bytes, not {expected.num_bytes}"
            elif None not in (state.tag, expected.tag) and state.tag != expected.tag:
                found = f"has changed (its tag is {state.tag}, not {expected.tag})"
            else:
                sound[shard.name] = state
                continue
            raise UserError(
                f"The shard {storage.where(shard.name)} {found}: the index in "
                f"{self.path}/{INDEX_DIRECTORY} is of another state. Put the shard back, or run "
                f"`latentmill index {storage.where('').rstrip('/')}` (that makes it another data "
                "set)."
            )
        return sound

    def not_indexed(self, root: Path | str) -> list[str]:
        """Shards directly below `root` that are not in the index; empty without listings."""
        try:
            found = find_shards(root).names
        except UserError:
            return []
        return sorted(set(found) - {shard.name for shard in self.shards})

    def _open_table(self, shard: int) -> ShardTable:
        entry = self.shards[shard]
        table = self._files.table(entry.name)
        origin = table.origin
        is_ours = (origin.shard_sha256, origin.split_digest) == (entry.sha256, self.splits.digest)
        if not is_ours or table.num_rows != entry.samples:
            raise UserError(
                f"The index table of {entry.name} does not belong to {self.path}/{INDEX_DIRECTORY}/"
                f"{MANIFEST}: indexing was stopped half-way; run `latentmill index` again."
            )
        return table


def _by_count(suffixes: dict[str, int] | None) -> dict[str, int] | None:
    """Samples per suffix, the most frequent first; None where there are very many."""
    if suffixes is None:
        return None
    return dict(sorted(suffixes.items(), key=lambda item: (-item[1], item[0])))
