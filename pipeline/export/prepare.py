"""Prepares an export: what its config names, before the first task.

config -> trained model, index, device -> encoder and plan -> Prepared
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.common.console import progress
from pipeline.common.errors import UserError
from pipeline.common.precision import fix_arithmetic
from pipeline.data.decode import Decode, ImageDecode
from pipeline.data.index import Index
from pipeline.data.sequential import read_shards
from pipeline.data.settings import DataConfig
from pipeline.data.storage import open_storage
from pipeline.data.storage.opening import open_writable
from pipeline.distributed.rendezvous import check_device
from pipeline.export.encoders import OpenEncoder, RunEncoder
from pipeline.export.layout import ExportDir
from pipeline.export.passthrough import JsonFields
from pipeline.export.plan import ExportPlan, Task
from pipeline.export.run import Work
from pipeline.export.settings import ExportConfig
from pipeline.export.work import Encoding, Noise
from pipeline.export.workers import Worker
from pipeline.training.locations import OVERRIDES, find_data

CPU_THREADS = 1  # more would split sums differently; use more processes
# Packages that turn bytes into pixels, pixels into latents, or latents into files.
VERSIONED = (
    "torch",
    "numpy",
    "pyarrow",
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
    "webdataset",
)
CODE = 1  # version of our code: raised when the bytes or statistics of a task change


@dataclass(frozen=True)
class Prepared:
    """An export that is ready to start."""

    export: ExportDir
    plan: ExportPlan
    work: Work
    data: DataConfig
    index: Index


def prepare(config: ExportConfig, worker: Worker) -> Prepared:
    """Load the model, open the data and make the plan; UserError if something is missing."""
    device = find_device(worker.local_rank)
    fix_arithmetic()
    if device.type == "cpu":
        torch.set_num_threads(CPU_THREADS)
    else:
        torch.cuda.set_device(device)
    opened = config.encoder.open(device, config.size)
    data, index = open_data(config, opened, progress if worker.rank == 0 else lambda _: None)
    with closing(open_storage(data.sources[0].root, data.remote)) as storage:
        index.check_shards(storage)
    tasks = tuple(make_tasks(index, data.split))
    encoding = make_encoding(config, opened, tasks, device)
    wanted, bound = data.decode.member_suffixes, config.max_bad_fraction
    index.check_suffixes(wanted, bound, "data.suffixes", split=data.split)
    fingerprint = make_fingerprint(config, opened, data, index, encoding)
    plan = ExportPlan(fingerprint, tasks)

    work = Work(
        read=partial(
            read_shards, data, index, batch_size=config.batch_size, pin=device.type == "cuda"
        ),
        encoder=encoding,
        writers=config.formats,
        max_bad_fraction=config.max_bad_fraction,
    )
    return Prepared(ExportDir(open_writable(config.out)), plan, work, data, index)


def find_device(local_rank: int) -> torch.device:
    """Return this worker's accelerator, or the CPU if there is none.

    Raises UserError if there is none and the launcher requires one.
    """
    check_device(os.environ, has_gpu=torch.cuda.is_available())
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def open_data(
    config: ExportConfig, encoder: OpenEncoder, say: Callable[[str], None]
) -> tuple[DataConfig, Index]:
    """Return the data settings of the training, updated by those of the export, and the index.

    The training's data is looked for if it has moved, see `training.locations`. Nothing is
    augmented in an export, so the training's augmentations need not fit its size.
    """
    trained, decode = encoder.data, _decode_of(config, encoder)
    if trained is None:
        if config.data.path is None:
            raise UserError(
                f"{encoder.where} is a model without a data set: name the one to export by "
                "data.path."
            )
        trained = DataConfig(path=config.data.path, decode=decode)
    own: dict[str, Any] = {
        "split": config.data.split,
        "threads": config.data.threads,
        "decode": decode.model_dump(),
        "augmentations": (),
    }
    index: Index | None = None
    if config.data.path is not None:
        own |= {"path": config.data.path, "shards": config.data.shards, "mixture": ()}
    elif trained.mixture:
        paths = ", ".join(source.path for source in trained.mixture)
        raise UserError(
            f"The run was trained on a mixture ({paths}): name the one data set to export by "
            "data.path."
        )
    elif isinstance(config.encoder, RunEncoder):
        shards = () if config.data.shards is None else (config.data.shards,)
        run_dir = Path(config.encoder.path)
        trained, [index] = find_data(run_dir, trained, shards=shards, options=OVERRIDES, say=say)
    data = DataConfig.model_validate(trained.model_dump() | own)
    return data, index or Index.open(data.sources[0].path, remote=data.remote)


def _decode_of(config: ExportConfig, encoder: OpenEncoder) -> Decode:
    """Return how files become events, in members with the suffixes of the export."""
    suffixes, decode = config.data.suffixes, encoder.decode
    if suffixes is None:
        return decode
    if isinstance(decode, ImageDecode):
        return decode.model_copy(update={"suffixes": suffixes})
    if len(suffixes) != 1:
        raise UserError(
            f"data.suffixes is [{', '.join(suffixes)}], but arrays (data.decode.kind of "
            f"{encoder.where}) have one suffix: name one."
        )
    return decode.model_copy(update={"suffix": suffixes[0]})


def make_encoding(
    config: ExportConfig, encoder: OpenEncoder, tasks: Sequence[Task], device: torch.device
) -> Encoding:
    """Return the function from stored values to latents; UserError if it cannot be stored."""
    if "hflip" in config.views and encoder.decode.kind != "image":
        raise UserError(
            f"views is [{', '.join(config.views)}], but the run's data.decode.kind is "
            f"{encoder.decode.kind!r}: only images are mirrored. Set views to [identity]."
        )
    return Encoding(
        encode=encoder.encode,
        to_unit=encoder.decode.to_unit,
        device=device,
        precision=config.precision,
        stored=_stored(config, encoder),
        dtype=config.dtype,
        views=config.views,
        noise=_noise(config.seed, tasks) if config.store == "sample" else None,
        json_fields=JsonFields(config.data.label_field, config.columns),
    )


def _stored(config: ExportConfig, encoder: OpenEncoder) -> tuple[str, ...]:
    if config.store == "moments":
        return encoder.outputs
    if config.store == "mean":
        return ("mu",)
    if "logvar" not in encoder.outputs:
        raise UserError(
            f"store is sample, but the model in {encoder.where} has a deterministic bottleneck: "
            "without a variance there is nothing to sample. Set store to mean."
        )
    return ("z",)


def _noise(seed: int, tasks: Sequence[Task]) -> Noise:
    starts = accumulate((task.rows for task in tasks), initial=0)
    return Noise(seed, {task.name: start for task, start in zip(tasks, starts, strict=False)})


def make_tasks(index: Index, split: str) -> Iterator[Task]:
    """Yield a task per shard that has rows of the split."""
    counts: Sequence[int] = np.asarray(index.counts(split)).tolist()
    for number, (shard, rows) in enumerate(zip(index.shards, counts, strict=True)):
        if rows:
            name = shard.name.removesuffix(".tar")
            yield Task(name, number, rows, shard.name, shard.sha256)


def make_fingerprint(
    config: ExportConfig,
    encoder: OpenEncoder,
    data: DataConfig,
    index: Index,
    encoding: Encoding,
) -> dict[str, Any]:
    """Return everything that the files depend on; without paths, hosts and times."""
    on_gpu = encoding.device.type == "cuda"
    return {
        "model": dict(encoder.identity),
        "data": {
            "dataset_id": index.dataset_id,
            "split": index.split_identity(data.split),
            "decode": data.decode.model_dump(mode="json"),
            "label_field": config.data.label_field,
        },
        "encode": {
            "batch_size": config.batch_size,
            "precision": config.precision,
            # Kernels, and so the last bits, depend on the device.
            "device": (
                torch.cuda.get_device_name(encoding.device)
                if on_gpu
                else f"cpu {torch.backends.cpu.get_cpu_capability()}"
            ),
            "threads": CPU_THREADS,
        },
        "output": {
            "store": config.store,
            "views": list(config.views),
            "fields": list(encoding.fields),
            "seed": None if encoding.noise is None else encoding.noise.seed,
            "columns": config.columns,
            "latent_shape": list(encoder.latent_shape),
            "dtype": config.dtype,
            "formats": [writer.model_dump(mode="json") for writer in config.formats],
        },
        "versions": {"code": CODE} | {name: version(name) for name in VERSIONED},
    }
