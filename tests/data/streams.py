"""A data set of every kind of sample, and what a stream delivers of it, slot by slot."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from webdataset.writer import TarWriter

from pipeline.corruptions import Corruption, GaussianNoise, Masking, SaltAndPepper
from pipeline.data.decode import ArrayDecode, ImageDecode
from pipeline.data.index import Index
from pipeline.data.index.reader import States
from pipeline.data.settings import DataConfig
from pipeline.data.stream import Quarantined
from pipeline.distributed.gather import RowGather
from pipeline.losses.objective import Objective
from pipeline.models.likelihoods import SquaredError
from pipeline.training.forward import Forward
from tests.data.order_reference import Shape, SlowOrder
from tests.shards import open_stream, tiny_image

IMAGES = ImageDecode(size=24)
ARRAYS = ArrayDecode(shape=(3, 4), range=(-2.0, 2.0))
CORRUPTIONS = (Masking(fraction=0.2), GaussianNoise(sigma=(0.1, 0.5)), SaltAndPepper(fraction=0.1))
FORMATS = (
    ("jpg", {"format": "JPEG", "quality": 95}),
    ("png", {"format": "PNG"}),
    ("webp", {"format": "WEBP", "lossless": True}),
)
SEED = 5
# Lanes that do not divide over 4 ranks, windows that end inside a step, groups of spans.
SETTINGS = {"split": "all", "lanes": 6, "interleave": 3, "window": 5}


class Slot(NamedTuple):
    """All that training takes from one slot of one step, tensors as their bytes."""

    step: int
    slot: int
    key: str
    uid: int
    epoch: int
    weight: float
    label: int
    x: bytes
    corrupted: bytes
    noise_key: int


def source_image(number: int) -> np.ndarray:
    """RGB, or grey for every second three: [24 or 40, same] and the colours."""
    pixels = tiny_image(number, 24 if number % 4 else 40)
    return pixels[:, :, 1] if number // 3 % 2 else pixels


def source_array(number: int) -> np.ndarray:
    """float32 [3, 4] within [-2, 2]."""
    return np.random.default_rng(number).uniform(-2, 2, (3, 4)).astype(np.float32)


def label_of(number: int) -> int:
    """Every seventh sample has no label."""
    return number % 5 if number % 7 else -1


def npy(array: np.ndarray) -> bytes:
    """The array as a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def members_of(number: int) -> dict[str, bytes]:
    """An image in one of three formats, an array, and mostly a label."""
    suffix, options = FORMATS[number % 3]
    file = io.BytesIO()
    Image.fromarray(source_image(number)).save(file, **options)
    members = {suffix: file.getvalue(), "npy": npy(source_array(number))}
    return members | ({"cls": b"%d" % label_of(number)} if label_of(number) >= 0 else {})


def write_shards(
    folder: Path, counts: Sequence[int], damage: Mapping[int, dict[str, bytes | None]] | None = None
) -> None:
    """Write s-000.tar ...; `damage`: members of a sample to replace, or to leave out (None)."""
    folder.mkdir(parents=True)
    number = 0
    for shard, count in enumerate(counts):
        with TarWriter(str(folder / f"s-{shard:03d}.tar"), encoder=False, mtime=0) as tar:
            for _ in range(count):
                members = members_of(number) | (damage or {}).get(number, {})
                whole = {suffix: data for suffix, data in members.items() if data is not None}
                tar.write({"__key__": f"{number:06d}", **whole})
                number += 1


def forward_of(decode: ImageDecode | ArrayDecode, corruptions: Sequence[Corruption]) -> Forward:
    """What makes inputs of batches, without a model's part."""
    return Forward(
        decode=decode,
        corruptions=tuple(corruptions),
        likelihood=SquaredError(),
        objective=Objective(),
        seed=SEED,
        precision="fp32",
        device=torch.device("cpu"),
        memory_format=torch.channels_last,
        latent_transforms=(),
        networks={},
        gather=RowGather(),
    )


def delivered(
    index: Index,
    *,
    batch_size: int = 12,
    num_steps: int | None = None,
    first_step: int = 0,
    world: int = 1,
    tail: str = "carry",
    parts: int = 1,
    decode: ImageDecode | ArrayDecode = IMAGES,
    quarantined: list[Quarantined] | None = None,
    states: Sequence[States] | None = None,
    **settings: object,
) -> list[Slot]:
    """What all ranks of a training get, in order of step and slot; `parts`: micro-batches."""
    data = DataConfig(path=str(index.path), decode=decode, **(SETTINGS | settings))
    forward = forward_of(decode, CORRUPTIONS)
    slots: list[Slot] = []
    for rank in range(world):
        with open_stream(
            data,
            index=index,
            seed=SEED,
            batch_size=batch_size,
            first_step=first_step,
            num_steps=num_steps,
            rank=rank,
            world=world,
            tail=tail,
            states=states,
        ) as stream:
            for step, batch in enumerate(stream, first_step):
                inputs = [forward.inputs(part, "train") for part in batch.split(parts)]
                columns = (
                    batch.uid.tolist(),
                    batch.epoch.tolist(),
                    batch.weight.tolist(),
                    batch.label.tolist(),
                    [x.numpy().tobytes() for x in batch.x],
                    [x.numpy().tobytes() for part in inputs for x in part.corrupted],
                    [key for part in inputs for key in part.noise_keys.tolist()],
                )
                first_slot = rank * batch_size // world
                numbers = range(first_slot, first_slot + len(batch.keys))
                slots += [
                    Slot(step, slot, *values)
                    for slot, *values in zip(numbers, batch.keys, *columns, strict=True)
                ]
            if quarantined is not None:
                quarantined += stream.take_quarantined()
    return sorted(slots, key=lambda slot: slot[:2])


def slow_slots(
    rows: Sequence[Sequence[int]], shape: Shape, num_steps: int
) -> list[tuple[int, int, int, int, int]]:
    """(step, slot, sample number, epoch, weight) by the slow order; `rows`: numbers per shard."""
    slow = SlowOrder(shape)
    return [
        (step, slot, rows[shard][row], epoch, weight)
        for step in range(num_steps)
        for slot, (epoch, (shard, row), weight) in enumerate(slow.step(step))
    ]
