"""Embed image files with an exported encoder: onnxruntime, numpy and Pillow, nothing of pipeline.

latentmill export-model runs/photos models/photos --onnx
python examples/embed_onnx.py models/photos latents.npy a.png b.jpg ...

latents.npy: float32 [images, *latent], the posterior means in the order of the files. An image of
the model's size is taken as it is; any other is cut to its central square and resized as a whole.
The pipeline does the same but for large JPEGs, which its decoder scales down on the way.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

BATCH_SIZE = 64


def read_image(file: str, decode: dict[str, Any]) -> np.ndarray:
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
    if side != size:
        image = image.resize((size, size), Image.Resampling[decode["resample"].upper()])
    return np.asarray(image).reshape(size, size, decode["channels"])


def embed(model: Path, files: Sequence[str]) -> np.ndarray:
    """Return the posterior means of the images, float32 [images, *latent]."""
    decode = json.loads((model / "config.json").read_text())["decode"]
    if decode["kind"] != "image":
        sys.exit(f"{model} takes arrays, not image files: give encoder.onnx its x by yourself")
    if not (model / "encoder.onnx").exists():
        sys.exit(f"{model} holds no encoder.onnx: `latentmill export-model RUN {model} --onnx`")
    session = onnxruntime.InferenceSession(model / "encoder.onnx")
    latents: list[np.ndarray] = []
    for start in range(0, len(files), BATCH_SIZE):
        x = np.stack([read_image(file, decode) for file in files[start : start + BATCH_SIZE]])
        latents += session.run(["mu"], {"x": x})
    return np.concatenate(latents)


if __name__ == "__main__":
    np.save(sys.argv[2], embed(Path(sys.argv[1]), sys.argv[3:]))
