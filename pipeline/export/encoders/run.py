"""The model of a training run's checkpoint."""

from typing import Literal

import torch
from pydantic import NonNegativeInt

from pipeline.common.files import local_directory
from pipeline.data.decode.image import Size
from pipeline.export.encoders.base import EncoderBase, OpenEncoder, open_autoencoder
from pipeline.training.loading import load_run


class RunEncoder(EncoderBase):
    """A checkpoint of a run."""

    kind: Literal["run"] = "run"
    path: str  # the run directory
    step: NonNegativeInt | Literal["best"] | None = None  # checkpoint; null = the newest
    weights: Literal["ema", "raw"] = "ema"  # averaged, or as trained

    def open(self, device: torch.device, size: Size | None = None) -> OpenEncoder:
        run_dir = local_directory(self.path, "The run")
        run = load_run(run_dir, step=self.step, weights=self.weights)
        return open_autoencoder(
            run.model,
            device,
            size=size,
            where=self.path,
            decode=run.config.data.decode,
            data=run.config.data,
            weights=self.weights,
            step=run.step,
            weights_sha256=run.weights_sha256,
        )
