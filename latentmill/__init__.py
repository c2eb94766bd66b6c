"""The Python interface of Latentmill.

    import latentmill as lm
    model = lm.load("models/photos")          # an exported model, or a run directory
    codes = model.encode(["a.jpg", "b.png"])  # codes.mu, codes.logvar, codes.sample(seed=0)
    model.decode(codes.mu), model.sample(16, seed=0)
    lm.LatentDataset("latents/photos"), lm.OrderedShards("data/photos", batch_size=64)
    lm.train(lm.TrainConfig.load("vae.yaml", "num_steps=100"))

A name is imported on first use: `lm.LatentDataset` needs neither torch nor anything else of the
extra `train`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.common import needs
from pipeline.common.errors import UserError

if TYPE_CHECKING:
    from latentmill.model import Codes, LoadedModel, load
    from pipeline.config import TrainConfig
    from pipeline.data.ordered_shards import OrderedShards
    from pipeline.latents import NO_LABEL, LatentDataset
    from pipeline.train import train

__all__ = [
    "NO_LABEL",
    "Codes",
    "LatentDataset",
    "LoadedModel",
    "OrderedShards",
    "TrainConfig",
    "UserError",
    "__version__",
    "load",
    "train",
]

_MODULES = {
    "Codes": "latentmill.model",
    "LatentDataset": "pipeline.latents",
    "LoadedModel": "latentmill.model",
    "NO_LABEL": "pipeline.latents",
    "OrderedShards": "pipeline.data.ordered_shards",
    "TrainConfig": "pipeline.config",
    "load": "latentmill.model",
    "train": "pipeline.train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'latentmill' has no attribute {name!r}")
    try:
        value = getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in needs.missing():
            raise
        raise UserError(f"latentmill.{name}: {needs.remedy([error.name])}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
