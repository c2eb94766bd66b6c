"""MosaicML streaming: MDS shards written by MDSWriter, read by its StreamingDataset and DataLoader.

As it comes, its `jpeg` column gives PIL images; for our decoder the column holds bytes.
"""

from pathlib import Path
from typing import Any

from PIL import Image
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

from benchmarks.rivals.loader import (
    Batch,
    OurDecoder,
    Task,
    TorchSession,
    files_of,
    pil_to_tensor,
    serve,
)

SHARD_SAMPLES = 250  # as many as one of the tars holds


class _Pictures(StreamingDataset):
    def __init__(self, task: Task, **settings: Any) -> None:
        super().__init__(**settings)
        self._to_tensor = OurDecoder(task.size) if task.our_decoder else pil_to_tensor

    def __getitem__(self, at: Any) -> dict[str, Any]:
        sample = super().__getitem__(at)
        return {"class": sample["class"], "image": self._to_tensor(sample["image"])}


def _unpack(batch: dict[str, Any]) -> Batch:
    return batch["class"], batch["image"]


class Mosaic:
    packages = ("mosaicml-streaming", "pillow")
    decoders = ("stock", "ours")
    has_state = True

    def prepare(self, task: Task, out: Path) -> None:
        files = files_of(task)
        num_bytes = sum(path.stat().st_size for path in files)
        limit = num_bytes * SHARD_SAMPLES // len(files)
        for column in ("jpeg", "bytes"):
            columns = {"class": "int", "image": column}
            with MDSWriter(out=str(out / column), columns=columns, size_limit=limit) as writer:
                for number, path in enumerate(files):
                    image = Image.open(path) if column == "jpeg" else path.read_bytes()
                    writer.write({"class": number, "image": image})

    def open(self, task: Task, state: Any) -> TorchSession:
        samples = _Pictures(
            task,
            local=str(Path(task.prepared, "bytes" if task.our_decoder else "jpeg")),
            shuffle=True,
            shuffle_seed=task.seed,
            batch_size=task.batch_size,
        )
        loader = StreamingDataLoader(
            samples,
            batch_size=task.batch_size,
            num_workers=task.workers,
            persistent_workers=True,
        )
        if state is not None:
            loader.load_state_dict(state)
        return TorchSession(loader, _unpack)


if __name__ == "__main__":
    serve(Mosaic())
