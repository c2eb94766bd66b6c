"""What every writer shares: the rows of one task, and the two things a writer does with them."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.component import Component

NO_LABEL = -1
FIELDS = ("mu", "logvar")  # mean and log-variance of the posterior; logvar only where it has one


@dataclass(frozen=True)
class Rows:
    """The latents of one source shard, in its order.

    n rows; a row that could not be read or encoded is kept, with zeros and valid = False.
    """

    shard: str  # stem of the source shard
    keys: Sequence[str]
    rows: NDArray[np.int64]  # [n] row numbers in the source shard
    valid: NDArray[np.bool_]  # [n]
    labels: NDArray[np.int64]  # [n], NO_LABEL = the source has none
    metadata: Sequence[str | None]  # [n] JSON texts of the source, passed through
    latents: dict[str, NDArray[Any]]  # field of FIELDS -> [n, *latent_shape] float16 or float32

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one row's latent."""
        return self.latents["mu"].shape[1:]


class BaseWriter(Component):
    """One file format. The same rows give the same bytes, and `read` returns what was written."""

    kind: str

    @property
    @abstractmethod
    def suffix(self) -> str:
        """The file's suffix, with its dot."""

    @abstractmethod
    def write(self, path: Path, rows: Rows) -> None:
        """Create the file, which must not exist."""

    @abstractmethod
    def read(self, path: Path) -> Rows:
        """Return the rows of a file; raises ValueError when it is damaged."""
