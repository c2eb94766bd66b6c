"""Embed image files with an exported encoder: onnxruntime, numpy and Pillow, nothing of pipeline.

latentmill export-model runs/photos models/photos --onnx
python examples/embed_onnx.py models/photos a.png b.jpg ... --out latents.npy

latents.npy: float32 [images, *latent], the posterior means in the order of the files. An image is
cut to its central square and resized to the model's size, as the pipeline does but for large JPEGs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

BATCH_SIZE = 64


def read_image(file: str, decode: dict) -> np.ndarray:
    """Return uint8 [size, size, channels], by the settings under which the model was trained."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (decode["background"],) * 3 + (255,))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    image = image.convert("RGB" if decode["channels"] == 3 else "L")
    side, size = min(image.size), decode["size"]
    left, top = ((length - side) // 2 for length in image.size)
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((size, size), Image.Resampling[decode["resample"].upper()])
    return np.asarray(image).reshape(size, size, decode["channels"])


def embed(model: Path, files: Sequence[str]) -> np.ndarray:
    """Return the posterior means of the images, float32 [images, *latent]."""
    decode = json.loads((model / "config.json").read_text())["decode"]
    if decode["kind"] != "image":
        sys.exit(f"{model} takes arrays, not image files: give encoder.onnx its x by yourself")
    if not (model / "encoder.onnx").exists():
        sys.exit(f"{model} holds no encoder.onnx: `latentmill export-model RUN {model} --onnx`")
    session, latents = onnxruntime.InferenceSession(model / "encoder.onnx"), []
    for start in range(0, len(files), BATCH_SIZE):
        x = np.stack([read_image(file, decode) for file in files[start : start + BATCH_SIZE]])
        latents += session.run(["mu"], {"x": x})
    return np.concatenate(latents)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    np.save(arguments.out, embed(arguments.model, arguments.images))
