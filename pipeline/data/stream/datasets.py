"""The data sets of a config, opened: locations of samples, their order, and how they are read.

DataConfig --open_indexes--> Index of each --order_of--> Mixture, built once per start
                                           --check_shards--> States, requested once per start
           --DataSets--> stores, fetchers, decoder of slots: all that a stream's threads need
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.data.augmentations import Augmenter
from pipeline.data.decode import Content, ImageDecode
from pipeline.data.index import Index
from pipeline.data.index.reader import ORDINAL_SHIFT, States
from pipeline.data.order import Order, Tail
from pipeline.data.order.choice import ChosenOrder
from pipeline.data.order.mixture import Mixture, lanes_of_parts
from pipeline.data.settings import DataConfig
from pipeline.data.storage import open_storage
from pipeline.data.stream.batch import BatchBuffer
from pipeline.data.stream.engine import DecodeSlot
from pipeline.data.stream.fetch import Fetcher


def open_indexes(data: DataConfig) -> tuple[Index, ...]:
    """Open the index of every data set that a config names; raise UserError."""
    return tuple(
        Index.open(source.path, number, data.remote) for number, source in enumerate(data.sources)
    )


def order_of(
    data: DataConfig,
    indexes: Sequence[Index],
    seed: int,
    batch_size: int,
    tail: Tail = "carry",
    *,
    max_samples: int | None = None,
) -> Mixture:
    """Build the order of a config's data; raise UserError on numbers that do not fit.

    max_samples: of each data set, chosen by key; None: all.
    """
    weights = [source.weight for source in data.sources]
    is_alone = len(indexes) == 1
    if not is_alone and tail != "carry":
        raise ValueError("only an endless stream can be mixed: read one data set at a time")
    orders: list[Order] = []
    lanes = lanes_of_parts(batch_size, data.lanes, weights)
    for index, part_lanes in zip(indexes, lanes, strict=True):
        counts = index.counts(data.split)
        make = Order
        if max_samples is not None and max_samples < int(counts.sum()):
            make = partial(ChosenOrder, max_samples=max_samples)
        order = make(
            counts,
            seed=seed,
            # A data set of a mixture has no batches of its own: the mixture sets its quotas.
            batch_size=batch_size if is_alone else part_lanes or 1,
            lanes=part_lanes,
            interleave=data.interleave,
            window=data.window,
            tail=tail,
            dataset_id=index.dataset_id,
            split=index.split_identity(data.split),
        )
        orders.append(order)
    return Mixture(orders, weights, batch_size)


def check_shards(data: DataConfig, indexes: Sequence[Index]) -> tuple[States, ...]:
    """Check the shards of every data set once; pass the states to each `open_stream`.

    Raises UserError unless the shards match the indexes, with checksums where required.
    """
    states: list[States] = []
    for source, index in zip(data.sources, indexes, strict=True):
        states.append(index.check_shards(open_storage(source.root, data.remote)))
        if data.verify_checksums and not index.has_checksums:
            raise UserError(
                f"data.verify_checksums: the index of {source.path} holds no checksums; run "
                f"`latentmill index --deep {source.root}`."
            )
    return tuple(states)


class SampleNames:
    """Keys and shard names of samples, from their indexes."""

    def __init__(self, indexes: Sequence[Index]) -> None:
        self._index_of = {index.ordinal: index for index in indexes}

    def keys(self, uids: NDArray[np.int64]) -> list[str]:
        """Return keys [n] of uids [n], which may belong to several data sets."""
        ordinals = uids >> ORDINAL_SHIFT
        keys = np.empty(len(uids), object)
        for ordinal in np.unique(ordinals).tolist():
            chosen = ordinals == ordinal
            keys[chosen] = self._index_of[ordinal].keys_of(uids[chosen])
        return keys.tolist()

    def key_and_shard(self, uid: int) -> tuple[str, str]:
        """Return (key, shard name) of a sample, for reports of bad samples."""
        index = self._index_of[uid >> ORDINAL_SHIFT]
        shard, _ = index.locate(np.array([uid]))
        return index.keys_of(np.array([uid]))[0], index.shards[int(shard[0])].name


class DataSets:
    """The stores, fetchers and decoder of one process; close it after its threads have ended."""

    def __init__(
        self,
        data: DataConfig,
        indexes: Sequence[Index],
        order: Mixture,
        states: Sequence[States],
    ) -> None:
        """Open the stores without checking shards; `states`: the result of `check_shards`."""
        self._data = data
        self.indexes = indexes
        self.order = order
        self.names = SampleNames(indexes)
        decode = data.decode  # arrays are not augmented
        size = decode.height_and_width if isinstance(decode, ImageDecode) else (1, 1)
        self.augmenter = Augmenter(data.augmentations, order.seed, size)
        self.storages = [open_storage(source.root, data.remote) for source in data.sources]
        for storage, seen in zip(self.storages, states, strict=True):
            for name, state in seen.items():
                storage.expect(name, state)
        self.fetchers = [
            Fetcher(
                index,
                storage,
                order,
                split=data.split,
                suffixes=data.decode.member_suffixes,
                draw=self.augmenter.draw,
                verify_checksums=data.verify_checksums,
            )
            for index, storage, order in zip(indexes, self.storages, order.orders, strict=True)
        ]

    def slot_decoder(self) -> DecodeSlot:
        """Return the function that decodes a member's bytes into a slot of a buffer."""
        decode, augmenter = self._data.decode, self.augmenter
        if augmenter.num_draws and isinstance(decode, ImageDecode):
            decode_view = decode.decode_view

            def decode_augmented(buffer: BatchBuffer, slot: int, content: Content) -> None:
                decode_view(content, buffer.slots[slot], augmenter.view_of(buffer.draws[slot]))

            return decode_augmented
        decode_whole = decode.decode

        def decode_plain(buffer: BatchBuffer, slot: int, content: Content) -> None:
            decode_whole(content, buffer.slots[slot])

        return decode_plain

    @property
    def num_read_threads(self) -> int:
        """Number of fetching threads; 0 = the decoding threads fetch, too."""
        if self._data.read_threads is not None:
            return self._data.read_threads
        return max(storage.num_readers for storage in self.storages)

    def close(self) -> None:
        """End waiting requests and close what is open."""
        for storage in self.storages:
            storage.close()
