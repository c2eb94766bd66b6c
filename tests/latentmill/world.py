"""What the tests of the package share: photos, a run trained on them, its model and its export."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import latentmill as lm
from pipeline.data.index.splits import SplitSpec
from pipeline.data.pack.pack import pack
from pipeline.data.pack.sources.folder import Folder
from pipeline.export.model import export_model
from tests.export.world import make_config, run_export

SIZE = 32
EXPORT_BATCH = 6
NUM_JPEGS = 20


@dataclass(frozen=True)
class World:
    """The paths of everything; read-only."""

    photos: Path  # image files
    shards: Path
    run: Path
    model: Path
    export: Path


def settings(shards: Path, run: Path) -> dict[str, object]:
    """The config of a tiny run, as a program gives it."""
    return {
        "run_dir": str(run),
        "data": {"path": str(shards), "decode": {"kind": "image", "size": SIZE}},
        "objective": {"regularisers": [{"kind": "kl"}]},
        "optimizer": {"learning_rate": {"warmup_samples": 0}},
        "ema_decay": 0.5,
        "batch_size": 8,
        "num_steps": 4,
        "evaluation": {"every_steps": 2},
        "checkpoint": {
            "every_steps": 2,
            "keep": {"best": {"metric": "eval/loss", "mode": "min"}},
        },
        "monitor": {"wandb": {"mode": "disabled"}},
    }


def make_world(root: Path) -> World:
    """Write photos, pack them, train for some steps, export model and latents."""
    made = World(*(root / name for name in ("photos", "shards", "run", "model", "export")))
    write_photos(made.photos)
    source = Folder(source=made.photos, shard_samples=9)
    pack(source, made.shards, split=SplitSpec(fractions={"train": 0.7, "held_out": 0.3}))
    assert lm.train(lm.TrainConfig(**settings(made.shards, made.run))) == 0
    export_model(made.run, made.model)
    config = make_config(made.run, made.export, batch_size=EXPORT_BATCH, columns={"path": "string"})
    assert run_export(config) == 0
    return made


def write_photos(folder: Path) -> None:
    """Write JPEGs from a quarter to 20 times the model's size, and every other kind of file."""
    folder.mkdir()
    generator = np.random.Generator(np.random.Philox(14))

    def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
        coarse = generator.integers(0, 256, (6, 6, len(mode)), np.uint8)
        image = Image.fromarray(coarse.squeeze(), mode)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    for number in range(NUM_JPEGS):
        width, height = generator.integers(8, 640, 2).tolist()
        photo(width, height).save(folder / f"{number:02d}.jpg", quality=90)
    photo(SIZE, SIZE).save(folder / "same.jpg", quality=90)
    photo(100, 60, "L").save(folder / "grey.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    photo(120, 80).save(folder / "turned.jpg", exif=turned)
    photo(50, 90, "RGBA").save(folder / "alpha.png")
    photo(70, 70).save(folder / "lossy.webp")


def png(image: Image.Image) -> bytes:
    """A lossless file of an image."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
