"""A torch model trained on an export, with loader workers; start it again to continue.

latentmill export run parquet run=runs/vae out=latents
python examples/latents.py latents probe.pt 3
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import latentmill as lm

BATCH_SIZE = 64  # over all ranks; this loop is one rank, see LatentDataset.batches(rank=, world=)


class Epoch(IterableDataset[tuple[Tensor, Tensor]]):
    """The batches of one epoch; the workers of a loader take turns, so the order stays."""

    def __init__(self, latents: lm.LatentDataset, epoch: int) -> None:
        self.latents, self.epoch = latents, epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        turn = {"worker": info.id, "workers": info.num_workers} if info else {}
        for rows in self.latents.batches(BATCH_SIZE, seed=0, epoch=self.epoch, **turn):
            rows.labels[rows.weight == 0] = lm.NO_LABEL  # broken, or there to fill the batch
            z = rows.sample(epoch=self.epoch)  # mu + sigma eps; `rows.mu` is the mean
            yield torch.from_numpy(z), torch.from_numpy(rows.labels)


def train(export: str, checkpoint: Path, num_epochs: int, workers: int = 2) -> None:
    """Fit a linear classifier of the labels up to `num_epochs`."""
    torch.manual_seed(0)
    latents = lm.LatentDataset(export, normalized=True)
    num_classes = int(latents.column("label").max()) + 1
    if num_classes == 0:  # all are NO_LABEL, which is -1
        raise SystemExit(f"{export} has no labels to learn")
    model = nn.Sequential(nn.Flatten(), nn.Linear(latents[0][latents.fields[0]].size, num_classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else {"epoch": 0}
    model.load_state_dict(saved.get("model", model.state_dict()))
    for epoch in range(saved["epoch"], num_epochs):
        for z, label in DataLoader(Epoch(latents, epoch), None, num_workers=workers):
            loss = nn.functional.cross_entropy(model(z), label, ignore_index=lm.NO_LABEL)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.save({"epoch": epoch + 1, "model": model.state_dict()}, checkpoint)
        print(f"epoch {epoch + 1}: cross-entropy {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, kind in (("export", str), ("checkpoint", Path), ("num_epochs", int)):
        parser.add_argument(name, type=kind)
    train(**vars(parser.parse_args()))
