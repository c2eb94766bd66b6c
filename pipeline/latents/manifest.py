"""The description of an export: manifest.json, whose hash _SUCCESS holds, and latent_stats.json."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.latents.fields import FieldType
from pipeline.latents.files import Files, damaged

# The same as in pipeline.export, a higher layer; tests compare the two.
FORMAT = "latentmill-export-v1"
MANIFEST, SUCCESS, PLAN = "manifest.json", "_SUCCESS", "_run/plan.json"


@dataclass(frozen=True)
class LatentManifest:
    """The manifest of a finished export."""

    values: Mapping[str, Any]
    sha256: str

    @property
    def model_sha256(self) -> str:
        """Identity of the weights that encoded."""
        return self.values["fingerprint"]["model"]["weights_sha256"]

    @property
    def encoder_sha256(self) -> str | None:
        """Identity of the encoder's weights; None in older exports."""
        return self.values["fingerprint"]["model"].get("encoder_sha256")

    def is_of(self, sha256: str) -> bool:
        """Whether the latents are of a model, by the digest of its weights or of its encoder."""
        return sha256 in (self.model_sha256, self.encoder_sha256)

    @property
    def fields(self) -> tuple[str, ...]:
        """The arrays stored per row: mu and, if stored, logvar, or z; then those of views."""
        return tuple(self.values["fingerprint"]["output"]["fields"])

    @property
    def columns(self) -> dict[str, FieldType]:
        """The fields of the samples' JSON that are stored as columns."""
        return self.values["fingerprint"]["output"].get("columns", {})

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one row's latent, channels first."""
        return tuple(self.values["fingerprint"]["output"]["latent_shape"])

    @property
    def dtype(self) -> str:
        """Type of the stored values."""
        return self.values["fingerprint"]["output"]["dtype"]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The formats; a task's files of each lie below data/<kind>/."""
        return tuple(kind["kind"] for kind in self.values["fingerprint"]["output"]["formats"])

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Rows per task."""
        return np.array([task["rows"] for task in self.values["tasks"]], np.int64)

    @property
    def task_names(self) -> list[str]:
        """Stems of the source shards."""
        return [task["name"] for task in self.values["tasks"]]


def read_manifest(files: Files, weights_sha256: str | None) -> LatentManifest:
    """Return the manifest; raise UserError unless the export is finished, undamaged and expected.

    weights_sha256: the expected model, or its encoder's digest; None = any.
    """
    root = files.where("").rstrip("/")
    data, seal = files.read_whole(MANIFEST), files.read_whole(SUCCESS)
    if seal is None:
        if data is None and files.read_whole(PLAN) is None:
            raise UserError(
                f"{root} holds no export: {MANIFEST} is not there. Name the directory or URL that "
                "`python -m pipeline.export` filled (its setting `out`)."
            )
        raise UserError(
            f"{root} holds an unfinished export: {SUCCESS} is not there. Give the export command "
            "again: it continues where it stopped. Only a finished export can be read."
        )
    if data is None:
        raise damaged(files.where(MANIFEST), "is missing")
    digest = hashlib.sha256(data).hexdigest()
    if seal.decode("ascii", "replace").strip() != digest:
        raise damaged(files.where(MANIFEST), f"has not the hash that {SUCCESS} holds")
    values = json.loads(data)
    if values["format"] != FORMAT:
        raise UserError(
            f"{root} has the format {values['format']!r}; this version reads {FORMAT!r}."
        )
    manifest = LatentManifest(values, digest)
    if weights_sha256 is not None and not manifest.is_of(weights_sha256):
        raise UserError(
            f"{root} holds latents of another model: its weights_sha256 is "
            f"{manifest.model_sha256}, expected was {weights_sha256}. Export with the expected "
            "model, or leave weights_sha256 out to read latents of any."
        )
    return manifest


def read_statistics(files: Files, manifest: LatentManifest) -> dict[str, Any]:
    """Return latent_stats.json; raise UserError unless it is the manifest's."""
    entry = manifest.values["statistics"]
    data = files.read_whole(entry["path"])
    if data is None:
        raise damaged(files.where(entry["path"]), "is missing")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise damaged(files.where(entry["path"]), "has not the hash that the manifest holds")
    return json.loads(data)


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation per channel of a sampled latent; broadcasts over rows."""

    mean: NDArray[np.float32]  # [C, 1, ...]
    std: NDArray[np.float32]  # [C, 1, ...]; 1 for a constant channel, which then becomes 0

    def apply(self, field: str, values: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[Any]:
        """Return normalised float32 `values` [n, C, ...]; invalid rows stay zeros."""
        if field.startswith("logvar"):
            scaled = values - 2 * np.log(self.std)
        else:
            scaled = (values - self.mean) / self.std
        scaled[~valid] = 0
        return scaled

    def invert(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Undo `apply` for `values` [n, C, ...] of mu or z: latents of the model, in float32."""
        return np.asarray(values, np.float32) * self.std + self.mean


def make_scale(statistics: Mapping[str, Any], num_axes: int, root: str) -> Scale:
    """Return the scale from latents_mean and latents_std; raise UserError where there is none."""
    if "latents_mean" not in statistics:
        raise UserError(
            f"{root} holds no valid row, so it has no statistics: read it with normalized=False."
        )
    shape = (-1, *(1 for _ in range(num_axes - 1)))
    std = np.array(statistics["latents_std"], np.float32).reshape(shape)
    mean = np.array(statistics["latents_mean"], np.float32).reshape(shape)
    return Scale(mean, np.where(std > 0, std, np.float32(1)))
