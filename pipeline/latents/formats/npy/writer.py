"""A matrix per task for faiss, autofaiss, embedding-reader and scikit-learn, and its sidecar.

    <shard>.npy      mu or z [rows, latent elements], the latent flattened in C order; np.load maps
                     it
    <shard>.parquet  the sidecar: its row i belongs to row i of the matrix and holds all other
                     columns of parquet/writer.py

embedding-reader takes every .npy below its folder and joins the n-th of them with the n-th
.parquet, so the folder holds no other files. Invalid rows are zeros in the matrix: leave them out
of an index by the sidecar's `valid`. Its schema holds the latent's shape, under "latentmill".
"""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.latents.formats.parquet.writer import read_parquet, write_parquet
from pipeline.latents.formats.writing import BaseWriter, Rows

SIDECAR = ".parquet"


class NpyWriter(BaseWriter):
    """A 2-D matrix of latents with the stem of the source shard, and a Parquet file beside it."""

    kind: Literal["npy"] = "npy"

    @property
    def suffix(self) -> str:
        return ".npy"

    @property
    def suffixes(self) -> tuple[str, ...]:
        return (self.suffix, SIDECAR)

    def write(self, path: Path, rows: Rows) -> None:
        matrix = np.ascontiguousarray(rows.latents[rows.main]).reshape(len(rows), -1)
        with path.open("xb") as file:
            np.save(file, matrix, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        others = [field for field in rows.latents if field != rows.main]
        write_parquet(path.with_suffix(SIDECAR), rows, others)

    def read(self, path: Path) -> Rows:
        try:
            matrix = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path.name} cannot be read: {error!r}") from error
        rows, described = read_parquet(path.with_suffix(SIDECAR))
        shape, fields = described["latent_shape"], described["fields"]
        expected = (len(rows), math.prod(shape))
        if matrix.shape != expected:
            raise ValueError(
                f"{path.name} cannot be read: it has the shape {matrix.shape}, but its sidecar "
                f"{path.stem}{SIDECAR} belongs to {expected}"
            )
        latents = {fields[0]: matrix.reshape(len(rows), *shape), **rows.latents}
        return replace(rows, latents=latents)
