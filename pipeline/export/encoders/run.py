"""The model of a training run's checkpoint."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import NonNegativeInt

from pipeline.export.encoders.base import EncoderBase, OpenEncoder, open_autoencoder
from pipeline.training.loading import load_run


class RunEncoder(EncoderBase):
    """A checkpoint of a run."""

    kind: Literal["run"] = "run"
    path: str  # the run directory
    step: NonNegativeInt | Literal["best"] | None = None  # checkpoint; null = the newest
    weights: Literal["ema", "raw"] = "ema"  # averaged, or as trained

    def open(self, device: torch.device) -> OpenEncoder:
        run = load_run(Path(self.path), step=self.step, weights=self.weights)
        return open_autoencoder(
            run.model,
            device,
            where=self.path,
            decode=run.config.data.decode,
            data=run.config.data,
            weights=self.weights,
            step=run.step,
            weights_sha256=run.weights_sha256,
        )
