"""A torch model trained on an export, with loader workers; start it again to go on.

python -m pipeline.export configs/export/parquet.yaml run=runs/vae out=latents
python examples/latents.py latents probe.pt 3
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.latents import NO_LABEL, LatentDataset

BATCH_SIZE = 64  # over all ranks; this loop is one rank, see LatentDataset.batches(rank=, world=)


class Epoch(IterableDataset[tuple[Tensor, Tensor]]):
    """The batches of one epoch; the workers of a loader take turns, so the order stays."""

    def __init__(self, latents: LatentDataset, epoch: int) -> None:
        self.latents, self.epoch = latents, epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        turn = {"worker": info.id, "workers": info.num_workers} if info else {}
        for rows in self.latents.batches(BATCH_SIZE, seed=0, epoch=self.epoch, **turn):
            rows.labels[rows.weight == 0] = NO_LABEL  # not encoded, or only there to fill the batch
            z = rows.sample(epoch=self.epoch)  # mu + sigma eps; `rows.mu` is the mean
            yield torch.from_numpy(z), torch.from_numpy(rows.labels)


def train(export: str, checkpoint: Path, num_epochs: int, workers: int = 2) -> None:
    """Fit a linear classifier of the labels up to `num_epochs`."""
    torch.manual_seed(0)
    latents = LatentDataset(export, normalized=True)
    num_values, num_classes = latents[0].mu.size, int(latents.column("label").max()) + 1
    model = nn.Sequential(nn.Flatten(), nn.Linear(num_values, num_classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        first = saved["epoch"]
    loss_of = nn.CrossEntropyLoss(ignore_index=NO_LABEL)
    for epoch in range(first, num_epochs):
        for z, label in DataLoader(Epoch(latents, epoch), None, num_workers=workers):
            loss = loss_of(model(z), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.save({"epoch": epoch + 1, "model": model.state_dict()}, checkpoint)
        print(f"epoch {epoch + 1}: cross-entropy {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
