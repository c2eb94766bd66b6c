"""Rows by key, from `keys.parquet`: sorted by hash, so a lookup reads one row group."""

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.latents.files import ByteFile, reported_as_damage

MAX_GROUPS = 64  # cached row groups, about 2 MB each


class UnknownKeyError(UserError, KeyError):
    """No row has the key."""

    __str__ = Exception.__str__  # that of KeyError puts the text in quotes


def key_hash(key: str) -> int:
    """Return the 64-bit number by which the key index is sorted."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


class KeyIndex:
    """The key index of an export; row groups are read when needed."""

    def __init__(self, file: ByteFile, where: str, task_names: list[str]) -> None:
        """Read the footer; raise UserError if it is damaged."""
        self._where = where
        with reported_as_damage(where):
            self._file = pq.ParquetFile(file.arrow())
            metadata = self._file.metadata
            ranges = [
                metadata.row_group(group).column(0).statistics
                for group in range(metadata.num_row_groups)
            ]
            if any(limits is None for limits in ranges):  # `None in ranges` crashes pyarrow 26
                raise ValueError("a row group has no statistics")
        self._highest = np.array([limits.max for limits in ranges], np.uint64)
        self._lowest = np.array([limits.min for limits in ranges], np.uint64)
        self._number = {name: number for number, name in enumerate(task_names)}
        self._group = lru_cache(maxsize=MAX_GROUPS)(self._read_group)

    def find(self, key: str) -> list[tuple[int, int]]:
        """Return (task number, position in it) of every row with the key."""
        wanted = np.uint64(key_hash(key))
        group = int(np.searchsorted(self._highest, wanted))
        found: list[tuple[int, int]] = []
        # Equal hashes may lie in two neighbouring groups.
        while group < len(self._lowest) and self._lowest[group] <= wanted:
            hashes, table = self._group(group)
            start, stop = (int(np.searchsorted(hashes, wanted, side)) for side in ("left", "right"))
            found += (
                (self._number[row["shard"]], row["position"])
                for row in table.slice(start, stop - start).to_pylist()
                if row["key"] == key
            )
            group += 1
        return found

    def _read_group(self, group: int) -> tuple[NDArray[np.uint64], Any]:
        with reported_as_damage(self._where):
            table = self._file.read_row_group(group, use_threads=False).combine_chunks()
        return table["key_hash"].to_numpy(), table.drop_columns(["key_hash"])
