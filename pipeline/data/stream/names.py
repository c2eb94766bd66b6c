"""What a sample is called: its key and shard, by its uid, in all data sets of a stream."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import Index
from pipeline.data.index.reader import ORDINAL_SHIFT


class SampleNames:
    """Look samples up in the indexes that they come from."""

    def __init__(self, indexes: Sequence[Index]) -> None:
        self._index_of = {index.ordinal: index for index in indexes}

    def keys(self, uids: NDArray[np.int64]) -> list[str]:
        """Return the keys of samples."""
        ordinals = uids >> ORDINAL_SHIFT
        keys = np.empty(len(uids), object)
        for ordinal in np.unique(ordinals).tolist():
            chosen = ordinals == ordinal
            keys[chosen] = self._index_of[ordinal].keys_of(uids[chosen])
        return keys.tolist()

    def place(self, uid: int) -> tuple[str, str]:
        """Return the key of one sample, and its shard's name."""
        index = self._index_of[uid >> ORDINAL_SHIFT]
        shard, _ = index.locate(np.array([uid]))
        return index.keys_of(np.array([uid]))[0], index.shards[int(shard[0])].name
