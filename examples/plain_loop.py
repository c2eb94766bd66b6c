"""A plain PyTorch loop over webdataset's own stages, in our order; start it again to continue.

latentmill pack sprites data/sprites --count 5000
python examples/plain_loop.py data/sprites plain.pt --steps 200
"""

import argparse
import os
from pathlib import Path

import torch
import webdataset as wds
from torch import nn

import latentmill as lm

BATCH_SIZE = 64  # over all ranks; this loop is one rank, see lm.OrderedShards(rank=, world=)


def train(shards: str, checkpoint: Path, num_steps: int, save_every: int) -> None:
    """Train a tiny autoencoder up to `num_steps`, from the checkpoint if there is one."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64 * 64, 128), nn.ReLU(), nn.Linear(128, 10))
    decoder = nn.Sequential(nn.Linear(10, 128), nn.ReLU(), nn.Linear(128, 64 * 64))
    model = nn.Sequential(encoder, decoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    source = lm.OrderedShards(shards, split="train", seed=0, batch_size=BATCH_SIZE)
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved["step"]
        for name, part in (("model", model), ("optimizer", optimizer), ("data", source)):
            part.load_state_dict(saved[name])

    # All behind the source is webdataset's: your own decoders, maps and batching go there.
    stages = (wds.decode("torchl"), wds.to_tuple("png"), wds.batched(BATCH_SIZE))
    batches = iter(wds.DataPipeline(source, *stages))
    for step in range(start + 1, num_steps + 1):
        (images,) = next(batches)  # float [64, 1, 64, 64] in [0, 1]
        loss = (model(images) - images.flatten(1)).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % save_every == 0 or step == num_steps:
            # What the loop has used: stages such as `batched` have taken samples ahead of it.
            data = source.state_dict(consumed=(step - start) * BATCH_SIZE)
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({"step": step, "data": data} | states, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
            print(f"step {step}: squared error {loss.item():.2f} per image", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", help="directory, URL or pattern of indexed shards")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=50)
    arguments = parser.parse_args()
    train(arguments.shards, arguments.checkpoint, arguments.steps, arguments.save_every)
