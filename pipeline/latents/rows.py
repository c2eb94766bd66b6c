"""Rows of an export in memory: one, or many with their latents as arrays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.latents.noise import normal, sample_keys

NO_LABEL = -1  # as pipeline.writers has it

# Column of texts, row numbers -> its values.
LookUp = Callable[[str, NDArray[np.int64]], list[Any]]


@dataclass(frozen=True)
class LatentRow:
    """One row; `valid` is False where the sample could not be encoded: its latents are zeros."""

    index: int  # row number in the export
    key: str
    valid: bool
    label: int  # NO_LABEL = the source has none
    metadata: str | None  # JSON text of the source
    latents: Mapping[str, NDArray[Any]]  # field -> [*latent_shape]

    @property
    def mu(self) -> NDArray[Any]:
        """The posterior's mean [*latent_shape]."""
        return self.latents["mu"]

    @property
    def logvar(self) -> NDArray[Any] | None:
        """The posterior's log-variance [*latent_shape]; None where none is stored."""
        return self.latents.get("logvar")


@dataclass(frozen=True)
class LatentRows:
    """n rows; those that are not valid hold zeros, those of weight 0 only fill a batch."""

    index: NDArray[np.int64]  # [n] row numbers in the export
    valid: NDArray[np.bool_]  # [n]
    labels: NDArray[np.int64]  # [n], NO_LABEL = the source has none
    latents: Mapping[str, NDArray[Any]]  # field -> [n, *latent_shape]
    weight: NDArray[np.float32]  # [n] 1, or 0: not valid, or a repeat at the end of an epoch
    look_up: LookUp = field(repr=False)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def keys(self) -> list[str]:
        """The rows' keys [n], looked up in the files (most steps of a training never ask)."""
        return self.look_up("key", self.index)

    @property
    def metadata(self) -> list[str | None]:
        """The JSON texts of the source [n], looked up in the files."""
        return self.look_up("metadata", self.index)

    @property
    def mu(self) -> NDArray[Any]:
        """The posteriors' means [n, *latent_shape]."""
        return self.latents["mu"]

    @property
    def logvar(self) -> NDArray[Any] | None:
        """The posteriors' log-variances [n, *latent_shape]; None where none are stored."""
        return self.latents.get("logvar")

    def row(self, place: int) -> LatentRow:
        """Return one of the rows."""
        number = self.index[place : place + 1]
        return LatentRow(
            int(number[0]),
            self.look_up("key", number)[0],
            bool(self.valid[place]),
            int(self.labels[place]),
            self.look_up("metadata", number)[0],
            {name: values[place] for name, values in self.latents.items()},
        )

    def sample(self, *, seed: int = 0, epoch: int = 0) -> NDArray[np.float32]:
        """Return z = mu + sigma * eps [n, *latent_shape]; rows that are not valid stay zeros.

        eps depends on (seed, epoch, row number, element) alone: not on batches, ranks, restarts.
        Rows read with normalized=True give normalised samples. Raises UserError when the export
        holds no log-variance.
        """
        if self.logvar is None:
            raise UserError(
                "sample() needs a log-variance, and this export stores the mean alone: use `mu`, "
                "or export a gaussian model with store: moments."
            )
        keys = sample_keys(seed, "latents", epoch=epoch, uid=self.index)
        eps = normal(keys, self.mu.shape[1:])
        sigma = np.exp(0.5 * self.logvar.astype(np.float32))
        z = self.mu.astype(np.float32) + sigma * eps
        z[~self.valid] = 0
        return z
