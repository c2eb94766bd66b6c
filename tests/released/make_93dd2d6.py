"""Write data, a run, an export and a model with the code of commit 93dd2d6, and what it said.

    cd CHECKOUT_OF_93dd2d6 && make setup
    OMP_NUM_THREADS=1 .venv/bin/python .../tests/released/make_93dd2d6.py FOLDER

It calls the command lines alone, and readers whose names have stayed: whatever code the interpreter
has installed writes into FOLDER, which must not exist. So the folders of two versions can be
compared file by file. 93dd2d6/README.md has the exact command.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from webdataset.writer import TarWriter

from pipeline.__main__ import main
from pipeline.data.index import Index
from pipeline.latents import LatentDataset
from pipeline.models.interchange import from_pretrained
from pipeline.train import main as train

SHARDS = (15, 4, 21)  # samples in each
BAD = 7  # this sample's picture is none
SPLIT = "{by: key, fractions: {train: 0.7, held_out: 0.3}, seed: 3}"
FORMATS = ("tar", "parquet", "npy", "safetensors")
NUM_STEPS, RESUMED_STEPS = 4, 7
TRAIN = """\
run_dir: run
data:
  path: data
  decode: {kind: image, size: 32, channels: 1}
  augmentations: [{kind: horizontal_flip}]
  interleave: 2
  window: 16
model:
  backbone: {kind: mlp, hidden: [4]}
  bottleneck: {kind: gaussian, size: 3}
  likelihood: {kind: bernoulli}
corruptions: [{kind: gaussian_noise, sigma: 0.2}]
objective:
  regularisers: [{kind: kl, weight: {kind: linear, over_samples: 64}}]
optimizer:
  learning_rate: {peak: 1e-2, warmup_samples: 16}
  weight_decay: 0.01
  max_grad_norm: 100.0
batch_size: 8
num_steps: 4
seed: 11
ema_decay: 0.9
evaluation: {every_steps: 4}
checkpoint: {every_steps: 4, keep: {best: {metric: eval_ema/loss}}}
monitor: {log_every_steps: 1, num_images: 2, wandb: {mode: disabled}}
"""
EXPORT = """\
run: run
out: export
batch_size: 6
views: [identity, hflip]
columns: {number: int64, group: string}
formats: [{kind: tar}, {kind: parquet}, {kind: npy}, {kind: safetensors}]
"""


def picture(number: int) -> bytes:
    """A grey square on a darker ground, 32 pixels wide, as a PNG file; the bad one is no file."""
    if number == BAD:
        return b"no picture"
    side, x, y = 4 + number % 9, number * 5 % 19, number * 3 % 17
    image = np.full((32, 32), number % 50, np.uint8)
    image[y : y + side, x : x + side] = 100 + number * 4 % 156
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path) -> None:
    folder.mkdir()
    number = 0
    for shard, count in enumerate(SHARDS):
        with TarWriter(str(folder / f"{shard:02d}.tar"), mtime=0) as tar:
            for _ in range(count):
                sample = {"__key__": f"{number:04d}", "png": picture(number), "cls": number % 3}
                tar.write(sample | {"json": {"number": number, "group": f"g{number // 4}"}})
                number += 1


def probe_images() -> torch.Tensor:
    """Images [4, 1, 32, 32] in [0, 1] that no generator had a part in."""
    return (torch.arange(4 * 32 * 32) * 7 % 61 / 60).reshape(4, 1, 32, 32)


def say(*arguments: str) -> str:
    """What `latentmill ...` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(arguments) == 0
    return said.getvalue()


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def order(*arguments: str) -> list[list[Any]]:
    """Who reads what: [step, slot, rank, shard, key]."""
    return [list(line.values()) for line in lines(say("order", *arguments))]


def index_of(path: str) -> dict[str, Any]:
    """What an index says of the samples, shard by shard."""
    index = Index.open(path)
    tables = [index.table(number) for number in range(len(index.shards))]
    return {
        "dataset_id": index.dataset_id,
        "samples_per_split": index.samples_per_split(),
        "split_identity": index.split_identity("held_out"),
        "uids": index.first_uids.tolist(),
        "keys": [table.keys() for table in tables],
        "splits": [table.split_numbers.tolist() for table in tables],
        "labels": [table.labels.tolist() for table in tables],
        "members": [[table.members(row) for row in range(table.num_rows)] for table in tables],
    }


def digest_of(array: np.ndarray) -> str:
    """SHA-256 of an array's type, shape and bytes."""
    head = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def rows_of(path: str, kind: str) -> dict[str, Any]:
    """Everything that an export holds in one format: digests of bytes, and of texts as JSON."""
    with LatentDataset(path, format=kind, weights_sha256=None) as dataset:
        rows = dataset[:]
        texts = {"keys": rows.keys, "metadata": rows.metadata, "texts": rows.texts}
        texts["group"] = dataset.column("group").tolist()
        arrays = {"valid": rows.valid, "labels": rows.labels, "number": dataset.column("number")}
        arrays |= rows.latents | {"sample": rows.sample(seed=2, epoch=1)}
        batches = [batch.keys for batch in dataset.batches(8, seed=5, epoch=1)]
        assert [dataset.by_key(key).index for key in rows.keys] == list(range(len(dataset)))
    found = {n: hashlib.sha256(json.dumps(v).encode()).hexdigest() for n, v in texts.items()}
    found |= {name: digest_of(array) for name, array in arrays.items()}
    return found | {"batches": batches}


def model_of(path: str) -> dict[str, Any]:
    """An exported model's tensors, as digests, and what it makes of `probe_images`."""
    model = from_pretrained(path)
    tensors = {name: digest_of(value.numpy()) for name, value in model.state_dict().items()}
    with torch.inference_mode():
        posterior = model(probe_images(), mode="encode").posterior
    return {
        "tensors": tensors,
        "mu": posterior.mu.tolist(),
        "logvar": posterior.logvar.tolist(),
    }


def logged(run: Path, *prefixes: str) -> dict[str, dict[str, float]]:
    """The values in metrics.jsonl whose names begin so, by step."""
    found: dict[str, dict[str, float]] = {}
    for record in lines((run / "metrics.jsonl").read_text()):
        values = {name: value for name, value in record.items() if name.startswith(prefixes)}
        found.setdefault(str(record["step"]), {}).update(values)
    return found


COMPUTED = ("train/", "eval/", "eval_ema/", "optim/")  # of metrics: all that is not of the clock


def norms_of(checkpoint: Path) -> dict[str, dict[str, float]]:
    """The length of every tensor of a checkpoint, by file."""
    return {
        path.stem: {name: value.double().norm().item() for name, value in load_file(path).items()}
        for path in sorted(checkpoint.glob("*.safetensors"))
    }


def mix(run_dir: str) -> dict[str, Any]:
    """Order and metrics of a short run on the data mixed with itself: two data sets of one name."""
    mixture = ("data.path=null", "data.mixture=[{path: data, weight: 2}, {path: data}]")
    assert train(["train.yaml", f"run_dir={run_dir}", "num_steps=2", *mixture]) == 0
    return {
        "order": order("train.yaml", *mixture, "--steps", "0:3"),
        "logged": logged(Path(run_dir), *COMPUTED),
    }


def resume(scratch: Path) -> dict[str, Any]:
    """What a copy of the run logs when it goes on to RESUMED_STEPS, and where it stands then."""
    shutil.copytree(".", scratch)
    with contextlib.chdir(scratch):
        assert train(["train.yaml", f"num_steps={RESUMED_STEPS}"]) == 0
        values = logged(Path("run"), *COMPUTED)
        norms = norms_of(Path(f"run/checkpoints/step-{RESUMED_STEPS}"))
    shutil.rmtree(scratch)
    further = {step: found for step, found in values.items() if int(step) > NUM_STEPS}
    return {"logged": further, "norms": norms}


def make() -> dict[str, Any]:
    """Fill the current directory, and return what the code says of what it wrote."""
    Path("train.yaml").write_text(TRAIN)
    Path("export.yaml").write_text(EXPORT)
    write_shards(Path("data"))
    say("index", "data", "--deep", "--workers", "1", "--split", SPLIT, "--json")
    assert train(["train.yaml"]) == 0
    assert main(["export", "run", "export.yaml"]) == 0
    report = say("export-model", "run", "model", "--latents", "export", "--json")
    raw = json.loads(say("export-model", "run", "raw", "--weights", "raw", "--json"))
    shutil.rmtree("raw")
    mixed = mix("mixed")
    shutil.rmtree("mixed")
    state = json.loads(Path(f"run/checkpoints/step-{NUM_STEPS}/state.json").read_text())
    first_steps = ("--steps", f"0:{RESUMED_STEPS}", "--world-size", "2")
    of_index = ("--batch-size", "6", "--seed", "5", "--split", "held_out", "--steps", "0:3")
    return {
        "index": index_of("data"),
        "order": order("train.yaml", *first_steps),
        "order_of_index": order("data", *of_index),
        "order_id": state["order_id"],
        "mixture": mixed,
        "weights_sha256": {
            "ema": json.loads(report)["weights_sha256"],
            "raw": raw["weights_sha256"],
        },
        "rows": {kind: rows_of("export", kind) for kind in FORMATS},
        "model": model_of("model"),
        "evaluation": json.loads(say("evaluate", "run", "--step", "best", "--json")),
        "evaluation_of_train": json.loads(say("evaluate", "run", "--split", "train", "--json")),
        "resumed": resume(Path.cwd().with_name(f"{Path.cwd().name}.resumed")),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1]).absolute()
    folder.mkdir(parents=True)
    os.chdir(folder)
    torch.set_num_threads(1)
    text = json.dumps(make(), indent=1)
    Path("expected.json").write_text(text + "\n")
