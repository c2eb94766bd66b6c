"""Rows of an export in memory: one, or many with their latents as arrays."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.latents.noise import sample

TEXTS = ("key", "metadata", "text")
# Of a row as a mapping, besides its latents.
ROW_ITEMS = ("index", "key", "valid", "label", "metadata", "text")

# Column of texts, row numbers -> its values.
LookUp = Callable[[str, NDArray[np.int64]], list[Any]]

Latents = Mapping[str, NDArray[Any]]


def field_of(name: str, view: str) -> str:
    """Return the field name of `mu`, `logvar` or `z` of a view."""
    return name if view == "identity" else f"{name}_{view}"


def _mean(latents: Latents, view: str = "identity") -> NDArray[Any]:
    name = field_of("mu", view)
    if name not in latents:
        raise UserError(
            f"This export stores {', '.join(latents)}, no {name}: it was made with store: sample. "
            "Use sample(), or export with store: moments or mean."
        )
    return latents[name]


@dataclass(frozen=True)
class LatentRow(Mapping[str, Any]):
    """One row; `valid` is False where the sample could not be encoded: its latents are zeros.

    Also a mapping of what torch's DataLoader makes batches of: index, key, valid, label, metadata
    and text ("" = none), and the latents by field.
    """

    index: int  # row number in the export
    key: str
    valid: bool
    label: int  # NO_LABEL = the source has none
    metadata: str | None  # JSON text of the source
    text: str | None  # of the source's `.txt`
    latents: Latents  # field -> [*latent_shape]

    def __getitem__(self, name: str) -> Any:
        if name in self.latents:
            return self.latents[name]
        if name not in ROW_ITEMS:
            raise KeyError(name)
        value = getattr(self, name)
        return "" if value is None else value

    def __iter__(self) -> Iterator[str]:
        return iter((*ROW_ITEMS, *self.latents))

    def __len__(self) -> int:
        return len(ROW_ITEMS) + len(self.latents)

    @property
    def mu(self) -> NDArray[Any]:
        """The posterior's mean [*latent_shape]; UserError where samples are stored."""
        return _mean(self.latents)

    @property
    def logvar(self) -> NDArray[Any] | None:
        """The posterior's log-variance [*latent_shape]; None where none is stored."""
        return self.latents.get("logvar")


@dataclass(frozen=True)
class LatentRows:
    """n rows; invalid ones hold zeros, and weight 0 marks them and repeats that fill a batch."""

    index: NDArray[np.int64]  # [n] row numbers in the export
    valid: NDArray[np.bool_]  # [n]
    labels: NDArray[np.int64]  # [n], NO_LABEL = the source has none
    latents: Latents  # field -> [n, *latent_shape]
    weight: NDArray[np.float32]  # [n] 1, or 0: not valid, or a repeat at the end of an epoch
    look_up: LookUp = field(repr=False)
    view_name: str = "identity"  # the view of `mu`, `logvar` and `sample`

    def __len__(self) -> int:
        return len(self.index)

    @property
    def keys(self) -> list[str]:
        """The rows' keys [n], looked up in the files only when requested."""
        return self.look_up("key", self.index)

    @property
    def metadata(self) -> list[str | None]:
        """The JSON texts of the source [n], looked up in the files."""
        return self.look_up("metadata", self.index)

    @property
    def texts(self) -> list[str | None]:
        """The `.txt` texts of the source [n], looked up in the files."""
        return self.look_up("text", self.index)

    @property
    def mu(self) -> NDArray[Any]:
        """The posteriors' means [n, *latent_shape]; UserError where samples are stored."""
        return _mean(self.latents, self.view_name)

    @property
    def logvar(self) -> NDArray[Any] | None:
        """The posteriors' log-variances [n, *latent_shape]; None where none are stored."""
        return self.latents.get(field_of("logvar", self.view_name))

    def view(self, name: str) -> Self:
        """Return the rows with `mu`, `logvar` and `sample` of a view: "identity" or "hflip".

        hflip: of the mirrored images. Raises UserError for a view that is not stored.
        """
        if not {field_of("mu", name), field_of("z", name)} & set(self.latents):
            raise UserError(
                f"There is no view {name!r}: this export stores {', '.join(self.latents)}. Export "
                "with views: [identity, hflip] for latents of the mirrored images, too."
            )
        return replace(self, view_name=name)

    def split(self) -> list[LatentRow]:
        """Return the rows one by one; their texts are looked up together."""
        texts = zip(*(self.look_up(name, self.index) for name in TEXTS), strict=True)
        return [
            LatentRow(
                index=int(self.index[i]),
                key=key,
                valid=bool(self.valid[i]),
                label=int(self.labels[i]),
                metadata=metadata,
                text=text,
                latents={name: values[i] for name, values in self.latents.items()},
            )
            for i, (key, metadata, text) in enumerate(texts)
        ]

    def sample(self, *, seed: int = 0, epoch: int = 0) -> NDArray[np.float32]:
        """Return z = mu + sigma * eps [n, *latent_shape]; invalid rows stay zeros.

        eps depends only on (seed, epoch, view, row number, element): not on batches, ranks,
        restarts, processors. An export of `store: sample` holds one draw, of its own seed and
        epoch 0, and returns it for any seed and epoch. Rows read with normalized=True give
        normalised samples. Raises UserError if the export holds means only.
        """
        stored = self.latents.get(field_of("z", self.view_name))
        if stored is not None:
            return stored.astype(np.float32)
        if self.logvar is None:
            raise UserError(
                "sample() needs a log-variance, and this export stores the mean alone: use `mu`, "
                "or export a gaussian model with store: moments."
            )
        z = sample(self.mu, self.logvar, self.index, seed=seed, epoch=epoch, view=self.view_name)
        z[~self.valid] = 0
        return z
