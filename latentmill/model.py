"""A trained model, ready to use: files to latents and latents to pictures.

path -> `export-model`'s folder | checkpoint of a run -> LoadedModel
pictures --inputs.py--> x [B, *event] in [0, 1] -> encoder -> Codes -> decoder -> [B, *event]

# B samples; event = shape of one sample, an image's is [C, H, W]; latent = shape of one latent
"""

import json
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from latentmill.inputs import Pictures, list_items, stack
from pipeline.common.errors import UserError
from pipeline.common.files import why_no_path
from pipeline.common.precision import autocast, fixed_arithmetic
from pipeline.data.decode import Decode
from pipeline.data.decode.image import Size
from pipeline.data.storage import is_url
from pipeline.latents import noise
from pipeline.models.autoencoder import AutoEncoder
from pipeline.models.interchange import CONFIG, from_pretrained, read_description
from pipeline.training.loading import load_config, load_run
from pipeline.training.resizing import decode_at, model_at

BATCH_SIZE = 64  # samples that go through the network at once, unless it is said
PRIOR = "prior"  # stream of the noise that `sample` decodes


@dataclass(frozen=True)
class Codes:
    """The encoder's output for B samples: a Gaussian each, or (logvar None) a point."""

    mu: Tensor  # [B, *latent]
    logvar: Tensor | None  # [B, *latent]

    def __len__(self) -> int:
        return len(self.mu)

    def sample(self, seed: int = 0) -> Tensor:
        """Return z = mu + sigma * eps [B, *latent]; eps depends on (seed, row, element) alone.

        The noise is the same on every device: that of `LatentRows.sample` for the first B rows
        of an export. Raises UserError for a model whose bottleneck is deterministic.
        """
        if self.logvar is None:
            raise UserError("sample() needs a variance, and these codes have none: use `mu`.")
        mu, logvar = self.mu.cpu().numpy(), self.logvar.cpu().numpy()
        z = noise.sample(mu, logvar, np.arange(len(mu)), seed=seed)
        return torch.from_numpy(z).to(self.mu.device)


class LoadedModel:
    """A trained autoencoder, as `load` returns it: evaluation mode, fp32, no gradients."""

    def __init__(self, module: AutoEncoder, decode: Decode, where: str) -> None:
        """Take a network, its training's decoder of files, and the path of both."""
        self.module = module.to(torch.float32).eval()
        self.where = where
        self._decode = decode

    def __repr__(self) -> str:
        takes, gives = list(self.event_shape), list(self.latent_shape)
        return f"LoadedModel({self.where!r}: {takes} in [0, 1] -> latents {gives}, {self.device})"

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample; an image's is (channels, height, width)."""
        return self.module.event_shape

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the code of one sample; of maps (channels, height, width)."""
        return self.module.latent_shape

    @property
    def device(self) -> torch.device:
        """The device of the weights, on which the model computes."""
        return next(self.module.parameters()).device

    def encode(
        self, pictures: Pictures, *, batch_size: int | None = None, size: Size | None = None
    ) -> Codes:
        """Return the codes of one picture, or of a list or batch of them, in their order.

        Paths, bytes of files, PIL images and uint8 or uint16 arrays ([H, W], [H, W, C], [C, H, W])
        may have any size: they become the model's input as in training. Floats are [C, H, W] or
        [B, C, H, W] of the model's size in [0, 1]. A model of arrays takes `.npy` files, their
        bytes, and arrays as its data holds them.

        batch_size: samples at a time; the last batch is filled with zeros, as in an export. With
        the batch_size and threads (one on a CPU) of an export, files in its order give the same
        bits. size: pixels of a side, or (height, width), instead of the model's own, for a fully
        convolutional model. Raises UserError for what cannot be read, or does not fit.
        """
        if batch_size is not None:
            _check_count("batch_size", batch_size)
        decode = decode_at(size, self.module.config, self._decode, self.where)
        module = model_at(self.module, decode)
        items = list_items(pictures, decode)
        at_once = batch_size or BATCH_SIZE
        parts: list[dict[str, Tensor]] = []
        with ThreadPoolExecutor() as pool, self._computing():
            for start in range(0, len(items), at_once):
                chunk = items[start : start + at_once]
                stored = stack(chunk, decode, batch_size or len(chunk), pool)
                x = decode.to_unit(stored.to(self.device))
                for row, item in enumerate(chunk):
                    if item.unit is not None:
                        x[row] = item.unit
                moments = module(x, mode="encode").code.moments()
                parts.append({name: values[: len(chunk)] for name, values in moments.items()})
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Codes(found["mu"], found.get("logvar"))

    def decode(self, z: Tensor | NDArray[Any]) -> Tensor:
        """Return the decoded latents z [B, *latent], as [B, *event] in [0, 1].

        A fully convolutional model takes maps [B, Z, h, w] of any size. Raises UserError for
        another shape, or numbers that are not finite.
        """
        sides: list[str] = [str(side) for side in self.latent_shape]
        any_size = self.module.config.backbone.fully_convolutional
        if any_size:
            sides[1:] = "h", "w"
        wanted = f"this model's latents are floats [B, {', '.join(sides)}]"
        if not isinstance(z, Tensor | np.ndarray):
            of_codes = ": take their mu, or a sample()" if isinstance(z, Codes) else ""
            raise UserError(f"decode: {wanted}; got {type(z).__name__}{of_codes}.")
        z = z if isinstance(z, Tensor) else torch.tensor(np.array(z))
        kept = 1 if any_size else len(self.latent_shape)  # sides that are the model's own
        fits = z.ndim == 1 + len(sides) and tuple(z.shape[1 : 1 + kept]) == self.latent_shape[:kept]
        if not z.is_floating_point() or not fits or 0 in z.shape[1:]:
            raise UserError(f"decode: {wanted}; got {z.dtype} {list(z.shape)}.")
        z = z.to(self.device, torch.float32)
        if not z.isfinite().all():
            raise UserError(f"decode: {wanted}; got numbers that are not finite.")
        with self._computing():
            return torch.cat([self.module.reconstruct(part) for part in z.split(BATCH_SIZE)])

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Return n decoded draws from the prior N(0, I), [n, *event] in [0, 1].

        The first k of n draws equal the k draws of the same seed. Raises UserError for a
        deterministic bottleneck, which has no prior.
        """
        _check_count("n", n)
        bottleneck = self.module.config.bottleneck
        if not bottleneck.has_density:
            raise UserError(
                f"{self.where} has a bottleneck of the kind {bottleneck.kind}, which has no prior "
                "to draw from: decode codes of pictures, or train with bottleneck gaussian."
            )
        keys = noise.sample_keys(seed, PRIOR, epoch=0, uid=np.arange(n))
        return self.decode(noise.normal(keys, self.latent_shape))

    @contextmanager
    def _computing(self) -> Generator[None]:
        """Compute as exports do, whatever the caller has set, and without gradients."""
        with torch.no_grad(), fixed_arithmetic(), autocast("fp32", self.device):
            yield


def load(
    path: str | Path,
    *,
    step: int | Literal["newest", "best"] = "newest",
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """Load a trained model: the folder of `latentmill export-model`, or a run directory.

    step: of a run, which checkpoint: that of a step, the best evaluated one, or the newest; its
    averaged weights if the run kept an average, as exports take them. Raises UserError if there is
    no such model.
    """
    folder = Path(path)
    if (folder / CONFIG).is_file():
        if step != "newest":
            raise UserError(
                f"step = {step!r}, but {path} is an exported model, which holds one step only: "
                "load the run, or export that step."
            )
        settings = json.dumps(read_description(folder).decode)
        decode: Decode = TypeAdapter(Decode).validate_json(settings)
        return LoadedModel(from_pretrained(folder, device=device), decode, str(path))
    if not (folder / "config.yaml").is_file():
        raise UserError(_no_model(path, folder))
    if isinstance(step, str) and step not in ("newest", "best"):
        raise UserError(f"step is {step!r}, but must be a number, 'newest' or 'best'.")
    config = load_config(folder)
    run = load_run(
        folder,
        step=None if step == "newest" else step,
        weights="raw" if config.ema_decay is None else "ema",
        config=config,
    )
    return LoadedModel(run.model.to(device), config.data.decode, str(path))


def _no_model(path: str | Path, folder: Path) -> str:
    """Say what the path holds instead of a model, and what to give."""
    if is_url(path):
        return f"{path} is a URL: copy the model's folder to this machine, and load it there."
    wanted = (
        "Give the folder that `latentmill export-model RUN FOLDER` wrote, or a run directory, "
        "which has a config.yaml."
    )
    if reason := why_no_path(path):
        return f"{str(path)!r} {reason}."
    if not folder.exists():
        hub = " Names of the Hugging Face Hub are not looked up." if str(path).count("/") else ""
        return f"{path} does not exist. {wanted}{hub}"
    if folder.is_file():
        return f"{path} is a file, and a model is a folder. {wanted}"
    if (folder / "manifest.json").is_file() or (folder / "_run").is_dir():
        return (
            f"{path} holds the latents of an export: latentmill.LatentDataset reads them. {wanted}"
        )
    if (folder / "state.json").is_file():
        run = folder.parent.parent
        return f"{path} is one checkpoint of a run: load {run}, and choose it by step=."
    if (folder / "index").is_dir() or any(folder.glob("*.tar")):
        return f"{path} holds shards of a data set. {wanted}"
    return f"{path} holds no model. {wanted}"


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} is {value}, but must be at least 1.")
