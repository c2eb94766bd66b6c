"""Random pictures that compress as photographs do, as JPEG files and as webdataset shards.

    seed, number -> octaves of smooth noise and a few shapes -> JPEG (quality 90, 4:2:0)
                 -> files/NNN/NNNNNNNN.jpg, and tar/shard-NNNNNN.tar by webdataset's ShardWriter

The class (`.cls`) of a picture is its number, so that a loader's labels say what it delivered.
"""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from webdataset.writer import ShardWriter

QUALITY = 90
SHARD_SAMPLES = 250  # many small shards: rivals split whole shards over ranks and workers
FOLDER_FILES = 1000
SUMMARY = "pictures.json"


def picture(size: int, seed: int, number: int) -> np.ndarray:
    """RGB uint8 [size, size, 3]."""
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
    ycc = np.zeros((size, size, 3), np.float32)
    side = 2
    while side <= size:
        # Each octave is weaker than the one before, and colour is much smoother than brightness.
        strength = np.array([48, 20, 20]) * (2 / side) ** np.array([0.55, 0.8, 0.8])
        noise = rng.standard_normal((side, side, 3), np.float32) * strength.astype(np.float32)
        ycc += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
        side *= 2
    for _ in range(4):
        centre, axes = rng.integers(0, size, 2), rng.integers(size // 16, size // 3, 2)
        shape = (centre.tolist(), axes.tolist(), int(rng.integers(180)), 0, 360)
        inside = cv2.ellipse(np.zeros((size, size), np.uint8), *shape, 1, -1).astype(bool)
        ycc[inside] += rng.normal(0, [40, 15, 15]).astype(np.float32)
    ycc = np.clip(ycc + 128, 0, 255).astype(np.uint8)
    return cv2.cvtColor(ycc, cv2.COLOR_YCrCb2RGB)


def jpeg(pixels: np.ndarray) -> bytes:
    """The picture as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def make_pictures(out: Path, *, size: int, count: int, seed: int) -> None:
    """Write the pictures unless `out` holds them."""
    if not (out / SUMMARY).exists():
        unfinished = out.with_name(f"{out.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "tar").mkdir(parents=True)
        summary = _write(unfinished, size=size, count=count, seed=seed)
        (unfinished / SUMMARY).write_text(json.dumps(summary))
        unfinished.rename(out)


def read_summary(out: Path) -> dict[str, Any]:
    """{bytes: of all JPEG files, means: the mean level, 0 to 255, of each by Pillow's decoder}."""
    return json.loads((out / SUMMARY).read_text())


def _write(out: Path, *, size: int, count: int, seed: int) -> dict[str, Any]:
    num_bytes, means = 0, []
    pattern = str(out / "tar" / "shard-%06d.tar")
    with ShardWriter(pattern, maxcount=SHARD_SAMPLES, verbose=0) as shards:
        for number in range(count):
            data = jpeg(picture(size, seed, number))
            name = f"{number:08d}"
            path = out / "files" / f"{number // FOLDER_FILES:03d}" / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            shards.write({"__key__": name, "jpg": data, "cls": number})
            num_bytes += len(data)
            means.append(float(np.asarray(Image.open(io.BytesIO(data))).mean()))
    return {"bytes": num_bytes, "means": means}
