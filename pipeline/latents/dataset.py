"""LatentDataset: the rows of an export as a sequence, a table and a stream of batches."""

import operator
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Self, get_args, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.common.needs import is_missing
from pipeline.data.storage import RemotePolicy, is_url, open_storage
from pipeline.data.storage.opening import local_path
from pipeline.latents.batches import (
    INTERLEAVE,
    WINDOW,
    Share,
    make_order,
    plan_steps,
    steps_per_epoch,
)
from pipeline.latents.fields import field_array
from pipeline.latents.files import Files, LocalFiles, RemoteFiles, damaged
from pipeline.latents.formats.reading import COLUMNS, NUMBERS, Ints
from pipeline.latents.keys import KeyIndex, UnknownKeyError
from pipeline.latents.manifest import Scale, make_scale, read_manifest, read_statistics
from pipeline.latents.rows import LatentRow, LatentRows
from pipeline.latents.shards import Shards, choose_format

CACHE_BYTES = 1 << 30  # of remote ranges

Tail = Literal["mask", "drop"]


class LatentDataset:
    """A finished export, as a sequence of rows, shard by shard.

        ds = LatentDataset("latents", normalized=True)
        ds[5], ds[10:20], ds.by_key("000000123"), ds.column("label")
        for batch in ds.batches(256, seed=0, epoch=0, rank=r, world=w, start=step): ...

    Files are opened when needed, at most 128 shards at a time; a pickled copy opens its own.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        format: str | None = None,  # noqa: A002 - what users call it
        normalized: bool = False,
        weights_sha256: str | None = None,
        remote: RemotePolicy | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Read the manifest; raise UserError unless a finished export of that model is there.

        root: a directory, or a URL. format: which of the stored ones to read; None = the fastest.
        normalized: latents per channel to mean 0 and standard deviation 1 of a sampled latent, as
        float32, by the export's own statistics. weights_sha256: the expected model, or its
        encoder_sha256; None = any. remote: attempts, limits and connections for a URL;
        None = the defaults. cache_bytes: of remote ranges kept in memory.
        """
        self._arguments: dict[str, Any] = {
            "format": format,
            "normalized": normalized,
            "weights_sha256": weights_sha256,
            "remote": remote,
            "cache_bytes": cache_bytes,
        }
        self.root = str(root)
        self._files: Files = (
            RemoteFiles(open_storage(root, remote), cache_bytes)
            if is_url(root)
            else LocalFiles(Path(local_path(root)))
        )
        self.manifest = read_manifest(self._files, weights_sha256)
        self.format = choose_format(self.root, self.manifest, format)
        self.normalized = normalized
        scale = self._scale if normalized else None
        self._shards = Shards(self._files, self.manifest, self.format, scale)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(LatentDataset, self.root, **self._arguments), ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections to a remote store; reading again opens new ones."""
        self._files.close()

    def __repr__(self) -> str:
        kind = "normalised " * self.normalized + " + ".join(self.fields)
        return (
            f"LatentDataset({self.root!r}: {len(self):,} rows, {kind} {list(self.latent_shape)} "
            f"{self.manifest.dtype}, read from {self.format})"
        )

    def __len__(self) -> int:
        return int(self._shards.first_row[-1])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one row's latent, channels first."""
        return self.manifest.latent_shape

    @property
    def fields(self) -> tuple[str, ...]:
        """The arrays of a row: ("mu", "logvar"), ("mu",) or ("z",); then the same + "_hflip"."""
        return self.manifest.fields

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """The statistics of all valid rows: latents_mean, latents_std, scaling_factor ..."""
        return read_statistics(self._files, self.manifest)

    def denormalize(self, z: NDArray[Any]) -> NDArray[np.float32]:
        """Return latents for the model's decoder from normalised ones: mu or z of rows read with
        normalized=True, or generated ones.

        z: [n, *latent_shape]. Raises UserError for another shape, or an export without statistics.
        """
        if z.shape[1:] != self.latent_shape:
            raise UserError(
                f"Latents to denormalise have the shape {list(z.shape)}, but those of {self.root} "
                f"have [n, {', '.join(map(str, self.latent_shape))}]."
            )
        return self._scale.invert(z)

    @overload
    def __getitem__(self, rows: int) -> LatentRow: ...

    @overload
    def __getitem__(self, rows: slice | Sequence[int] | NDArray[Any]) -> LatentRows: ...

    def __getitem__(
        self, rows: int | slice | Sequence[int] | NDArray[Any]
    ) -> LatentRow | LatentRows:
        """Return one row by its number, or several by a slice or a list of numbers.

        Raises IndexError for a number that is not there.
        """
        if isinstance(rows, slice):
            return self._take(np.arange(*rows.indices(len(self))))
        if isinstance(rows, Sequence | np.ndarray):
            numbers = np.asarray(rows)
            if numbers.size and numbers.dtype.kind not in "iu":
                raise IndexError(f"rows are numbers, not {numbers.dtype}")
            return self._take(self._checked(numbers.astype(np.int64).reshape(-1)))
        return self._take(self._checked(np.array([operator.index(rows)]))).split()[0]

    def __getitems__(self, rows: Sequence[int]) -> list[LatentRow]:
        """Return the rows of a batch, which torch's DataLoader asks for at once."""
        return self[rows].split()

    def by_key(self, key: str) -> LatentRow:
        """Return the row with a key; raise UnknownKeyError, or UserError when several have it."""
        rows = self.rows_of_key(key)
        if not rows:
            raise UnknownKeyError(
                f"No row of {self.root} has the key {key!r} ({len(self):,} rows, such as "
                f"{self[0].key!r})."
                if len(self)
                else f"{self.root} holds no row."
            )
        if len(rows) > 1:
            raise UserError(
                f"{len(rows)} rows of {self.root} have the key {key!r}, which the data set holds "
                f"more than once: rows {', '.join(map(str, rows[:10]))}; read them by number."
            )
        return self[rows[0]]

    def rows_of_key(self, key: str) -> list[int]:
        """Return the numbers of all rows with a key: none, one, or several."""
        return [int(self._shards.first_row[task]) + row for task, row in self._key_index.find(key)]

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of all rows: key, metadata, text, valid, label, a field of the latents,
        or one of the export's setting `columns`, which is read from the metadata.

        Texts come as an array of objects. Raises UserError for another name.
        """
        kind = self.manifest.columns.get(name)
        if kind is not None:
            return field_array(self.column("metadata").tolist(), name, kind)
        if name not in (*COLUMNS, *self.fields):
            names = ", ".join((*COLUMNS, *self.fields, *self.manifest.columns))
            raise UserError(f"There is no column {name!r} in {self.root}: choose one of {names}.")
        counts = enumerate(self.manifest.counts.tolist())
        return np.concatenate([self._shards.read(n, name, np.arange(count)) for n, count in counts])

    def to_pandas(self) -> Any:
        """Return all rows as a pandas.DataFrame: key, label, valid, metadata, text, the columns of
        the export's setting `columns`, each field of the latents; UserError without pandas.
        """
        if is_missing("pandas"):
            raise UserError("to_pandas() needs pandas, which is not installed: pip install pandas.")
        names = ("key", "label", "valid", "metadata", "text", *self.manifest.columns)
        frame = pa.table({name: pa.array(self.column(name)) for name in names}).to_pandas()
        for field in self.fields:  # an array [*latent_shape] per row
            frame[field] = list(self.column(field))
        return frame

    def num_steps(self, batch_size: int, *, tail: Tail = "mask") -> int:
        """Return the steps of an epoch of `batches`."""
        return (len(self) // batch_size) if tail == "drop" else -(-len(self) // batch_size)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        worker: int = 0,
        workers: int = 1,
        tail: Tail = "mask",
        lanes: int | None = None,
        interleave: int = INTERLEAVE,
        window: int = WINDOW,
    ) -> Iterator[LatentRows]:
        """Yield one epoch's batches from step `start` on; raise UserError on numbers that clash.

        batch_size: rows of a step over all ranks. Each rank gets an equal part, and the parts by
        rank form the same batch for any world. worker of workers: takes every n-th step, so a
        DataLoader(batch_size=None) gives the steps in order. tail: `mask` yields every row once and
        fills the last batch with repeats of weight 0; `drop` leaves out the incomplete batch.
        lanes, interleave, window: how far rows are mixed, see pipeline.data.order; lanes None = the
        largest divisor of batch_size up to 8. About lanes x interleave shards are in use at a time,
        of which 128 stay open.
        """
        if tail not in get_args(Tail):
            raise UserError(f"tail is {tail!r}, but must be {' or '.join(get_args(Tail))}.")
        share = Share(rank, world, worker, workers)
        share.check(batch_size)
        order = make_order(
            self.manifest.counts,
            batch_size=batch_size,
            seed=seed,
            tail=tail,
            lanes=lanes,
            interleave=interleave,
            window=window,
        )
        if epoch < 0 or not 0 <= start <= steps_per_epoch(order):
            raise UserError(
                f"epoch = {epoch}, start = {start}: epochs count from 0, and one has "
                f"{steps_per_epoch(order)} steps of batch_size = {batch_size}."
            )
        steps = plan_steps(
            order, self._shards.first_row[:-1], epoch=epoch, start=start, share=share
        )
        return (self._take(rows, repeated) for rows, repeated in steps)

    @cached_property
    def _key_index(self) -> KeyIndex:
        name = self.manifest.values["keys"]["path"]
        where = self._files.where(name)
        try:
            file = self._files.open(name)
        except FileNotFoundError:
            raise damaged(where, "is missing") from None
        return KeyIndex(file, where, self.manifest.task_names)

    @cached_property
    def _scale(self) -> Scale:
        return make_scale(self.statistics, len(self.manifest.latent_shape), self.root)

    def _checked(self, rows: Ints) -> Ints:
        outside = (rows < -len(self)) | (rows >= len(self))
        if outside.any():
            raise IndexError(f"row {rows[outside][0]} of {self.root}, which has {len(self)} rows")
        return np.where(rows < 0, rows + len(self), rows)

    def _take(self, rows: Ints, repeated: NDArray[np.bool_] | None = None) -> LatentRows:
        columns = self._shards.take(rows, (*NUMBERS, *self.fields))
        weight = columns["valid"].astype(np.float32)
        if repeated is not None:
            weight[repeated] = 0
        return LatentRows(
            index=rows,
            valid=columns["valid"],
            labels=columns["label"],
            latents={field: columns[field] for field in self.fields},
            weight=weight,
            look_up=self._texts,
        )

    def _texts(self, name: str, rows: Ints) -> list[Any]:
        return self._shards.take(rows, (name,))[name].tolist()
