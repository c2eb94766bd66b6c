"""Tiny runs of a config with overrides, and what can be seen of them."""

import hashlib
import json
import re
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from webdataset.writer import TarWriter

from pipeline.common import strict
from pipeline.common.errors import UserError
from pipeline.config import TrainConfig
from pipeline.data.index import Index, build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.distributed.outcome import Failures
from pipeline.distributed.runtime import Runtime
from pipeline.distributed.watchdog import Watchdog
from pipeline.train import train
from pipeline.training.build import make_strategy
from pipeline.training.loading import load_run
from tests.monitoring.pieces import pieces, run_of
from tests.shards import open_stream, png, tiny_image


def write_shards(folder: Path) -> None:
    """Pictures and arrays of several kinds; splits train, held_out and other."""
    folder.mkdir()
    for shard in range(4):
        with TarWriter(str(folder / f"{shard}.tar"), mtime=0) as tar:
            for number in range(12 * shard, 12 * shard + 12):
                tar.write(sample(number))
    build_index(folder, split=SplitSpec(fractions={"train": 0.6, "held_out": 0.2, "other": 0.2}))


def sample(number: int) -> dict[str, Any]:
    """A translucent picture and two arrays; some have another size, suffix, shape or dtype."""
    size = 12 if number % 2 else 10
    alpha = np.full((size, size, 1), 128, np.uint8)
    picture = png(np.concatenate([tiny_image(number, size=size), alpha], axis=2))
    shape, dtype = (3, 2) if number % 4 == 0 else (2, 3), "f2" if number % 4 == 1 else "f4"
    values = np.random.default_rng(number).random(shape).astype(dtype)
    suffix = ("png", "webp")[number // 2 % 2]
    return {"__key__": f"{number:04d}", suffix: picture, "npy": values, "b.npy": values / 2}


BASE = {
    "data": {
        "decode": {"kind": "image", "size": 8},
        "max_bad_fraction": 1.0,
        "threads": 1,
        "read_threads": 1,
    },
    "model": {
        "backbone": {"kind": "mlp", "hidden": [6]},
        "bottleneck": {"kind": "gaussian", "size": 2},
    },
    "objective": {"regularisers": [{"kind": "kl"}]},
    "batch_size": 8,
    "num_steps": 4,
    "evaluation": {"every_steps": 2},
    "monitor": {"log_every_steps": 1, "wandb": {"mode": "disabled"}},
}


class World:
    """Runs of the base config with overrides, each once."""

    def __init__(self, shards: Path, tmp_path: Path) -> None:
        self.shards = shards
        self.tmp_path = tmp_path
        self._runs: dict[tuple[str, ...], Path] = {}

    def config(self, overrides: tuple[str, ...]) -> TrainConfig:
        places = (f"data.path={self.shards}", f"run_dir={self.tmp_path / str(len(self._runs))}")
        overrides = tuple(o.replace("{tmp}", str(self.tmp_path)) for o in (*places, *overrides))
        overrides = tuple(re.sub(r"\{sha256:(.+?)\}", self._digest, o) for o in overrides)
        last = {override.partition("=")[0]: override for override in overrides}
        return strict.load(TrainConfig, None, list(last.values()), text=json.dumps(BASE))

    def _digest(self, name: re.Match[str]) -> str:
        """The digest of a file of `tmp_path`, as a string of YAML."""
        digest = hashlib.sha256((self.tmp_path / name[1]).read_bytes()).hexdigest()
        return f"'{digest}'"

    def run(self, overrides: tuple[str, ...]) -> Path:
        """Train to the end; the run directory."""
        if overrides not in self._runs:
            config = self.config(overrides)
            self._runs[overrides] = Path(config.run_dir)
            train(config)
        return self._runs[overrides]


Given = tuple[str, ...]


def records(run: Path) -> list[dict[str, float]]:
    """Everything logged that does not depend on the clock."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [
        {k: v for k, v in json.loads(line).items() if k != "time" and not k.startswith("perf/")}
        for line in lines
    ]


def losses(world: World, given: Given) -> list[float]:
    return [r["train/loss"] for r in records(world.run(given)) if "train/loss" in r]


def evaluation(world: World, given: Given) -> Any:
    found = [{k: v for k, v in r.items() if "eval" in k} for r in records(world.run(given))]
    return [values for values in found if values]


def logged_steps(world: World, given: Given) -> list[float]:
    return [r["step"] for r in records(world.run(given)) if "train/loss" in r]


def evaluated_steps(world: World, given: Given) -> list[float]:
    return [r["step"] for r in records(world.run(given)) if "eval/loss" in r]


def checkpoints(world: World, given: Given) -> list[str]:
    return sorted(path.name for path in (world.run(given) / "checkpoints").iterdir())


def best(world: World, given: Given) -> int:
    """The step of the best checkpoint."""
    return load_run(world.run(given), step="best").step


def ended_at(world: World, given: Given) -> int:
    return json.loads((world.run(given) / "outcome.json").read_bytes())["step"]


def watches(world: World, given: Given) -> set[str]:
    """Names of the threads while a run has its watchdog."""
    runtime = Runtime.start(accumulation=1)
    failures = Failures(world.tmp_path, "attempt", rank=0, world=1)
    with closing(Watchdog(world.config(given).watchdog, failures, runtime)):
        return {thread.name for thread in threading.enumerate()} & {"watchdog"}


def tensors(world: World, given: Given, name: str) -> dict[str, bytes]:
    newest = max((world.run(given) / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    found = (
        load_file(newest / f"{name}.safetensors")
        if (newest / f"{name}.safetensors").exists()
        else {}
    )
    return {f"{key} {value.dtype}": value.numpy().tobytes() for key, value in found.items()}


def weights(world: World, given: Given) -> dict[str, bytes]:
    return tensors(world, given, "model")


def started(world: World, given: Given) -> dict[str, bytes]:
    """The weights of a run that may start from those of the base config."""
    base = str(world.run(()))
    return weights(world, tuple(override.replace("{base}", base) for override in given))


def average(world: World, given: Given) -> dict[str, bytes]:
    return tensors(world, given, "ema")


def ending(world: World, given: Given) -> str:
    try:
        world.run(given)
    except (UserError, RuntimeError) as error:
        return str(error)
    return "done"


def quarantined(world: World, given: Given) -> set[tuple[str, str]]:
    path = world.run(given) / "quarantine.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {(json.loads(line)["key"], json.loads(line)["stage"]) for line in lines}


def picture_sizes(world: World, given: Given) -> list[tuple[int, int]]:
    sizes: list[tuple[int, int]] = []
    for path in sorted((world.run(given) / "images").glob("*.png")):
        with Image.open(path) as image:
            sizes.append(image.size)
    return sizes


def shown(world: World, given: Given) -> list[Any]:
    """What the evaluations show, in order, without the values."""
    found: list[Any] = []
    for path in sorted((world.run(given) / "images").glob("*.json")):
        sheet = json.loads(path.read_bytes())
        kinds = ("pictured", "best", "worst")
        found.append([[row["key"] for row in sheet.get(kind, [])] for kind in kinds])
    return found


def place(world: World, given: Given) -> bool:
    world.run(given)
    return (world.tmp_path / "elsewhere" / "outcome.json").exists()


def thread_names(world: World, given: Given) -> list[str]:
    config = world.config(given)
    with open_stream(config.data, index=Index.open(config.data.path), seed=0, batch_size=8):
        return sorted(t.name for t in threading.enumerate() if t.name.startswith("stream-"))


def buffers(world: World, given: Given) -> int:
    """How many batches are decoded before the first is asked for, and one."""
    config = world.config(given)
    stream = open_stream(config.data, index=Index.open(config.data.path), seed=0, batch_size=8)
    with stream:
        time.sleep(0.3)
        return len({next(stream).x.data_ptr() for _ in range(8)})


def memory_format(world: World, given: Given) -> set[bool]:
    strategy = make_strategy(world.config(given), Runtime.start(accumulation=1))
    images = [p for p in strategy.model.parameters() if p.ndim == 4]
    return {p.is_contiguous(memory_format=torch.channels_last) for p in images}


def compiled(world: World, given: Given) -> bool:
    """`nn.Module.compile` leaves its compiled call there, and runs the compiler at the first."""
    strategy = make_strategy(world.config(given), Runtime.start(accumulation=1))
    return strategy.model.encoder._compiled_call_impl is not None


def wandb_run(world: World, given: Given) -> list[Any]:
    """What W&B's own file of the run holds about it."""
    names = ("project", "display_name", "run_group", "tags")
    runs = [run_of(piece) for piece in pieces(world.run(given) / "wandb")]
    return [[run.get(name) for name in names] for run in runs]
