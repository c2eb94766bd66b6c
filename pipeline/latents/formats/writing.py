"""The rows of one task, and the interface of writers: write and read them."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.common.component import Component

Dtype = Literal["float32", "float16", "bfloat16"]

# Fields of a latent: mean and log-variance of the posterior, or a sample; then the same of the
# mirrored image. Stored in this sequence.
FIELDS = ("mu", "logvar", "z", "mu_hflip", "logvar_hflip", "z_hflip")

# The other columns of every row, with the type names of `datasets`.
COLUMNS = {
    "key": "string",
    "shard": "string",
    "row": "int64",
    "valid": "bool",
    "label": "int64",
    "metadata": "string",
    "text": "string",
}
ColumnType = Literal["int64", "float64", "string", "bool"]


@dataclass(frozen=True)
class Column:
    """A field of the source's JSON as a column of its own."""

    kind: ColumnType
    values: Sequence[Any]  # [n]; None only in rows that are not valid


@dataclass(frozen=True)
class Rows:
    """The latents of one source shard, row by row.

    n rows; a row that could not be read or encoded is kept, with zeros and valid = False. Texts
    that are not UTF-8 keep their bytes as `pipeline.common.texts` has it.
    """

    shard: str  # stem of the source shard
    keys: Sequence[str]
    rows: NDArray[np.int64]  # [n] row numbers in the source shard
    valid: NDArray[np.bool_]  # [n]
    labels: NDArray[np.int64]  # [n], NO_LABEL = the source has none
    metadata: Sequence[str | None]  # [n] JSON texts of the source, passed through
    texts: Sequence[str | None]  # [n] plain texts of the source, never empty
    latents: dict[str, NDArray[Any]]  # field of FIELDS -> [n, *latent_shape] float16 or float32
    # numpy has no bfloat16: such numbers are kept in float32 arrays, which hold them exactly.
    bfloat16: bool = False
    columns: Mapping[str, Column] = field(default_factory=dict[str, Column])
    # By place in the rows: what the source has for a label where `labels` is NO_LABEL and that
    # does not mean that there is none: a text that is no integer, or -1 itself.
    label_texts: Mapping[int, str] = field(default_factory=dict[int, str])

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def main(self) -> str:
        """The first field: mu, or z."""
        return next(iter(self.latents))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Without the axis of rows: (Z,) or (Z, H, W)."""
        return self.latents[self.main].shape[1:]


class BaseWriter(Component):
    """One file format. The same rows give the same bytes, and `read` returns what was written.

    A format may need several files per task: they share a folder and differ in their suffix only.
    The path of the first one stands for all.
    """

    kind: str

    @property
    @abstractmethod
    def suffix(self) -> str:
        """The (first) file's suffix, with its dot."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of all files of a task, `suffix` first."""
        return (self.suffix,)

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """The types of latents that the format holds."""
        return ("float32", "float16")

    @abstractmethod
    def write(self, path: Path, rows: Rows) -> None:
        """Create the file or files, none of which may exist."""

    @abstractmethod
    def read(self, path: Path) -> Rows:
        """Return the rows of a file; raises ValueError if it or its sidecar is damaged."""
