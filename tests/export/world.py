"""A small data set and a run directory as of a training; what must be equal in two exports."""

import hashlib
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints.folder import RunState, save_checkpoint
from pipeline.common import strict
from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.data.index.manifest import has_index
from pipeline.data.index.splits import SplitSpec
from pipeline.data.pack.pack import pack
from pipeline.data.pack.sources import Sprites
from pipeline.distributed.strategies.base import FullState
from pipeline.export.command import begin, work_through
from pipeline.export.failures import clear_failures
from pipeline.export.settings import ExportConfig
from pipeline.export.workers import Worker
from pipeline.models.autoencoder import build_autoencoder

NUM_SHARDS = 10
SHARD_ROWS = 16
SPLIT = SplitSpec(fractions={"train": 0.7, "held_out": 0.3})


def tree(root: Path) -> dict[str, str]:
    """Hashes of all files that must not depend on how the work was divided."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] != "_run"
    }


def source_keys(data: Path) -> list[str]:
    """The keys of all shards in order, read without our own code."""
    keys: list[str] = []
    for path in sorted(data.glob("*.tar")):
        with tarfile.open(path) as tar:
            keys += [name.removesuffix(".png") for name in tar.getnames() if name.endswith(".png")]
    return keys


def damage_sample(data: Path, shard: str, sample: int) -> str:
    """Break the signature of a sample's picture in its shard, and return its key."""
    with tarfile.open(data / shard) as tar:
        member = [m for m in tar if m.name.endswith(".png")][sample]
    content = bytearray((data / shard).read_bytes())
    content[member.offset_data] ^= 0xFF
    (data / shard).write_bytes(content)
    return member.name.removesuffix(".png")


def damage_shard(data: Path, shard: str) -> None:
    """Break all pictures of a shard."""
    for sample in range(SHARD_ROWS):
        damage_sample(data, shard, sample)


def make_data(path: Path, *, shards: int = NUM_SHARDS) -> Path:
    pack(Sprites(count=SHARD_ROWS * shards, seed=1, shard_samples=SHARD_ROWS), path, split=SPLIT)
    return path


def make_run(
    run_dir: Path,
    data: Path,
    model: Mapping[str, Any],
    *,
    scale: float = 1.0,
    has_average: bool = True,
) -> Path:
    """Leave a run directory as training does: config and checkpoints; all weights times `scale`."""
    config = TrainConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "data": {"path": str(data), "decode": {"kind": "image", "size": 32, "channels": 1}},
            "model": {"backbone": {"kind": "mlp", "hidden": (32,)}, **model},
            "objective": {"regularisers": []},
        }
    )
    dataset_id = Index.open(data).dataset_id if has_index(data) else "data"
    shape = config.data.decode.event_shape
    for step in (1, 2):
        module = build_autoencoder(config.model, shape, seed=step, dtype=torch.float32)
        weights = {name: scale * value.detach() for name, value in module.state_dict().items()}
        ema = {name: value + 0.01 for name, value in weights.items()} if has_average else None
        tensors = FullState(model=weights, ema=ema, exp_avg={}, exp_avg_sq={}, num_updates=step)
        state = RunState(step, step, step, "order", dataset_id, 1, {})
        save_checkpoint(run_dir / "checkpoints", state, tensors)
    (run_dir / "config.yaml").write_text(strict.dump(config))
    return run_dir


def make_config(run_dir: Path, out: Path | str, **settings: Any) -> ExportConfig:
    """A config that writes both formats; keyword arguments replace settings."""
    defaults = {
        "run": str(run_dir),
        "out": str(out),
        "batch_size": 6,
        "formats": [{"kind": "tar"}, {"kind": "parquet"}],
    }
    return ExportConfig.model_validate_json(json.dumps(defaults | settings))


def run_export(
    config: ExportConfig, worker: Worker | None = None, *, retry_failed: bool = False
) -> int:
    """Take part in an export within this process."""
    worker = worker or Worker()
    prepared, _ = begin(config, worker)
    if retry_failed:
        clear_failures(prepared.export)
    return work_through(prepared, worker, lambda: False)
