"""LitData: chunks written by `optimize`, read by its StreamingDataset and StreamingDataLoader.

As it comes, a chunk stores JPEG files and hands out uint8 tensors; for our decoder it stores bytes.
"""

from pathlib import Path
from typing import Any

import litdata
from litdata import StreamingDataLoader, StreamingDataset
from PIL import Image

from benchmarks.rivals.loader import Batch, OurDecoder, Task, TorchSession, files_of, serve

CHUNK_SAMPLES = 250  # as many as one of the tars holds


def _as_image(item: tuple[int, str]) -> dict[str, Any]:
    return {"class": item[0], "image": Image.open(item[1])}


def _as_bytes(item: tuple[int, str]) -> dict[str, Any]:
    return {"class": item[0], "image": Path(item[1]).read_bytes()}


class _Decoded(StreamingDataset):
    """The stored bytes, decoded by our decoder."""

    def __init__(self, size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._our_decoder = OurDecoder(size)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        sample = super().__getitem__(index)
        return {"class": sample["class"], "image": self._our_decoder(sample["image"])}


def _unpack(batch: dict[str, Any]) -> Batch:
    return batch["class"], batch["image"]


class LitData:
    packages = ("litdata", "torchvision")
    decoders = ("stock", "ours")
    has_state = True

    def prepare(self, task: Task, out: Path) -> None:
        items = [(number, str(path)) for number, path in enumerate(files_of(task))]
        for name, read in (("image", _as_image), ("bytes", _as_bytes)):
            litdata.optimize(
                fn=read,
                inputs=items,
                output_dir=str(out / name),
                chunk_size=CHUNK_SAMPLES,
                num_workers=1,
            )

    def open(self, task: Task, state: Any) -> TorchSession:
        folder = str(Path(task.prepared, "bytes" if task.our_decoder else "image"))
        if task.our_decoder:
            samples = _Decoded(task.size, folder, shuffle=True, seed=task.seed)
        else:
            samples = StreamingDataset(folder, shuffle=True, seed=task.seed)
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
    serve(LitData())
