"""Hugging Face `datasets`, streaming webdataset shards in torch format, as its manual has it.

Resume by torchdata's StatefulDataLoader, which that manual recommends; ranks by
`split_dataset_by_node`.
"""

from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torchdata.stateful_dataloader import StatefulDataLoader

from benchmarks.rivals.loader import Batch, OurDecoder, Task, TorchSession, serve, shards_of

SHUFFLE_BUFFER = 1000


def _unpack(batch: dict[str, Any]) -> Batch:
    return torch.as_tensor(batch["cls"]), batch["jpg"]


class HuggingFace:
    packages = ("datasets", "torchdata", "pillow")
    decoders = ("stock", "ours")
    has_state = True

    def prepare(self, task: Task, out: Path) -> None:
        """Nothing: it reads webdataset shards."""

    def open(self, task: Task, state: Any) -> TorchSession:
        samples = datasets.load_dataset(
            "webdataset", data_files={"train": shards_of(task)}, split="train", streaming=True
        )
        samples = samples.select_columns(["cls", "jpg"])
        if task.our_decoder:
            decode = OurDecoder(task.size)
            samples = samples.cast_column("jpg", datasets.Image(decode=False))
        samples = samples.shuffle(seed=task.seed, buffer_size=SHUFFLE_BUFFER)
        if task.our_decoder:
            samples = samples.map(lambda row: {"jpg": decode(row["jpg"]["bytes"])})
        else:
            samples = samples.with_format("torch")
        if task.world > 1:
            samples = split_dataset_by_node(samples, rank=task.rank, world_size=task.world)
        loader = StatefulDataLoader(
            samples,
            batch_size=task.batch_size,
            num_workers=task.workers,
            persistent_workers=True,
        )
        if state is not None:
            loader.load_state_dict(state)
        return TorchSession(loader, _unpack, samples.set_epoch)


if __name__ == "__main__":
    serve(HuggingFace())
