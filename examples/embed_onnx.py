"""Embed image files with an exported encoder: onnxruntime, numpy and Pillow, nothing of pipeline.

latentmill export-model runs/photos models/photos --onnx
python examples/embed_onnx.py models/photos a.png b.jpg ... --out latents.npy

latents.npy: float32 [images, *latent], the posterior means in the order of the files. An image is
cut to the model's proportions and resized to its size, as the pipeline does but for large JPEGs.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

BATCH_SIZE = 64


def read_image(file: str, decode: dict) -> np.ndarray:
    """Return uint8 [height, width, channels], by the settings of the model's training."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data and decode["channels"] != 4:
        canvas = Image.new("RGBA", image.size, (decode["background"],) * 3 + (255,))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    image = image.convert({1: "L", 3: "RGB", 4: "RGBA"}[decode["channels"]])
    h, w = decode["size"] if isinstance(decode["size"], list) else [decode["size"]] * 2
    part = min(image.width, image.height * w / h), min(image.height, image.width * h / w)
    left, top = np.ceil((np.subtract(image.size, part) - 1) / 2).astype(int).tolist()
    columns, rows = np.ceil(part).astype(int).tolist()
    image = image.crop((left, top, left + columns, top + rows))
    image = image.resize((w, h), Image.Resampling[decode["resample"].upper()], box=(0, 0, *part))
    return np.asarray(image).reshape(h, w, decode["channels"])


def embed(model: Path, files: list[str]) -> np.ndarray:
    """Return the posterior means of the images, float32 [images, *latent]."""
    decode = json.loads((model / "config.json").read_text())["decode"]
    if decode["kind"] != "image" or "dtype" in decode:  # uint16
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
