"""Cards: figures of an evaluation, together with all that they depend on, as one JSON object.

splits that were read + settings -> Identity -> evaluation_id
Identity + model + figures       -> Card     -> RUN/evaluations/step-N-ID/card.json

splits of a training             -> RUN/evaluations/training.json: the same without figures

Two cards with one evaluation_id measured the same samples, decoded alike, by the same metrics:
their figures differ by the models, and by `seed` where something is corrupted or sampled. Figures
and `step` stand at the top, as in metrics.jsonl.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from pipeline import __version__
from pipeline.common.console import warn
from pipeline.common.files import canonical_json, temporary_name, write_json
from pipeline.config import TrainConfig
from pipeline.evaluation.splits import HeldOutSplit

FORMAT = "latentmill-evaluation-1"
EVALUATIONS = "evaluations"  # folder in a run directory
CARD, TRAINING = "card.json", "training.json"  # file of a card; of a training's own evaluations
ID_LENGTH = 16  # hexadecimal digits


@dataclass(frozen=True)
class Identity:
    """What an evaluation measures, apart from the model."""

    data: tuple[Mapping[str, Any], ...]  # of each data set
    preprocessing: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]  # settings
    max_samples: int | None = None  # of the config; `data` has the numbers that follow

    @classmethod
    def of(cls, config: TrainConfig, splits: Sequence[HeldOutSplit]) -> "Identity":
        """Return the identity of an evaluation of these splits."""
        return cls(
            tuple(_data_of(split) for split in splits),
            {
                "decode": config.data.decode.model_dump(mode="json"),
                "corruptions": [one.model_dump(mode="json") for one in config.corruptions],
            },
            tuple(metric.model_dump(mode="json") for metric in config.evaluation.metrics),
            config.evaluation.max_samples,
        )

    @property
    def evaluation_id(self) -> str:
        """Digest of samples, preprocessing and metrics; of no name, place or order of a list."""
        samples = [{k: one[k] for k in ("dataset_id", "split_id", "samples")} for one in self.data]
        metrics = [_without_places(metric) for metric in self.metrics]
        parts = [sorted(samples, key=canonical_json), self.preprocessing]
        content = canonical_json([*parts, sorted(metrics, key=canonical_json)])
        return hashlib.sha256(content).hexdigest()[:ID_LENGTH]

    def content(self) -> dict[str, Any]:
        """Return what a card says of it."""
        return {
            "evaluation_id": self.evaluation_id,
            "data": list(self.data),
            "max_samples": self.max_samples,
            "preprocessing": dict(self.preprocessing),
            "metrics": list(self.metrics),
        }


@dataclass(frozen=True)
class Card:
    """The result of one evaluation."""

    identity: Identity
    model: Mapping[str, Any]  # where it lies, and the sha256 of its weights by prefix
    step: int | None  # that the weights have seen; None: not known
    figures: Mapping[str, float]  # by the names that training logs
    precision: str  # of the model's arithmetic
    seed: int  # of the noise that corrupts, and that samples the posterior
    in_nats: bool  # whether the likelihood is
    notes: tuple[str, ...] = ()  # for a person
    folder: Path | None = None  # where it was written

    def content(self) -> dict[str, Any]:
        """Return the card as JSON holds it; a figure that is not finite is null."""
        return {
            "format": FORMAT,
            **self.identity.content(),
            "model": dict(self.model),
            "precision": self.precision,
            "seed": self.seed,
            "versions": _versions(),
            "notes": list(self.notes),
            "units": {name: unit for name in self.figures if (unit := self.unit(name))},
            **({} if self.step is None else {"step": self.step}),
            **{n: value if math.isfinite(value) else None for n, value in self.figures.items()},
        }

    def unit(self, figure: str) -> str:
        """Return the unit of a figure, or an empty text."""
        units = UNITS | {"distortion": "nats/image" if self.in_nats else "squared error/image"}
        name = figure.rpartition("/")[2]
        unit = next((units[stem] for stem in _stems(name) if stem in units), "")
        if not name.startswith(OF_DISTRIBUTIONS):
            return unit
        samples = self.figures[f"{figure.removesuffix(name)}samples"]
        kept = [one["images"] for one in self.identity.metrics if one["kind"] == "kid"]
        count = min([samples, *(kept if name.startswith("kid") else ())])
        return f"{unit}; N = {count:,.0f}"

    def written(self, folder: Path) -> "Card":
        """Write the card to a folder that is there, in the place of a former one."""
        try:
            write_json(folder / CARD, self.content())
        except OSError as error:
            warn(_not_written(folder, error))
            return self
        return replace(self, folder=folder)


def record_identity(run_dir: Path, identity: Identity) -> None:
    """Write what a training's own evaluations measure; their figures stand in metrics.jsonl."""
    (run_dir / EVALUATIONS).mkdir(exist_ok=True)
    content = {"format": FORMAT, **identity.content(), "versions": _versions()}
    write_json(run_dir / EVALUATIONS / TRAINING, content)


def is_writable(folder: Path) -> bool:
    """Whether a card can be written to the folder, which is made; if not, a warning says why."""
    probe = temporary_name(folder / CARD)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:  # as for a run that may only be read
        warn(_not_written(folder, error))
        return False
    return True


def _versions() -> dict[str, str]:
    return {"latentmill": __version__, "torch": version("torch")}


def _not_written(folder: Path, error: OSError) -> str:
    return (
        f"{folder} cannot be written to ({error.strerror}), so card and pictures are not there: "
        "--json prints the card, and --out names another folder"
    )


# By the figure's name, or by what it begins with.
UNITS = {
    "loss": "per image: the training objective",
    "nats": "nats/image: at least -ln p(x)",
    "kl": "nats/image",
    "bits_per_dimension": "bits per value of an image",
    "squared_error": "squared error/image: summed over its values in [0, 1]",
    "sigma2": "the likelihood's variance",
    "samples": "samples",
    "tombstones": "unusable samples",
    "psnr": "dB: mean over images",
    "psnr_pooled": "dB: of the mean squared error",
    "ssim": "1 = equal",
    "lpips": "distance: 0 = equal",
    "active_units": "dimensions of the latent",
    "fid": "squared distance: 0 = equal",
    "fd": "squared distance: 0 = equal",
    "kid": "squared distance: 0 = equal, can be negative",
}
OF_DISTRIBUTIONS = ("fid", "fd_", "kid")  # figures that depend on the number of samples


def _stems(name: str) -> list[str]:
    """Return the name, and what it is without its last words, the longest first."""
    words = name.split("_")
    return ["_".join(words[:count]) for count in range(len(words), 0, -1)]


def _data_of(split: HeldOutSplit) -> dict[str, Any]:
    order, name = split.order.orders[0], split.data.split
    return {
        **({"name": split.name} if split.name else {}),
        "path": split.data.path,
        "dataset_id": order.dataset_id,
        "split": name,
        "split_id": order.split,
        "split_samples": int(split.index.counts(name).sum()),
        "samples": order.num_samples,
    }


def _without_places(settings: Any) -> Any:
    """Return settings without paths of files whose sha256 stands beside them."""
    if isinstance(settings, Mapping):
        known = cast(Mapping[str, Any], settings)
        left_out = {"path"} if known.get("sha256") else set[str]()
        return {n: _without_places(value) for n, value in known.items() if n not in left_out}
    if isinstance(settings, list | tuple):
        return [_without_places(value) for value in cast(Sequence[Any], settings)]
    return settings
