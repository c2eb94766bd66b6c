"""New pictures, below a row of the export's own, by a rectified flow (Liu et al. 2022) of latents.

latentmill export-model runs/vae models/vae
python -m pipeline.export configs/export/parquet.yaml run=runs/vae out=exports/vae
python examples/latent_flow.py models/vae exports/vae flow.png 150    # epochs
"""

import sys

import torch
from PIL import Image
from torch import nn

from pipeline.latents import LatentDataset
from pipeline.models.interchange import from_pretrained

ROWS, COLUMNS, NUM_STEPS = 4, 12, 100


def train(latents: LatentDataset, num_epochs: int) -> nn.Module:
    """Fit the velocity of straight lines from noise z0 to latents z1: E |v(z, t) - (z1 - z0)|^2."""
    size = latents[0].mu.size
    layers: list[nn.Module] = [nn.Linear(size + 1, 256), nn.SiLU()]  # of z and t
    layers += [layer for _ in range(3) for layer in (nn.Linear(256, 256), nn.SiLU())]
    network = nn.Sequential(*layers, nn.Linear(256, size))
    optimizer = torch.optim.AdamW(network.parameters())
    for epoch in range(num_epochs):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - epoch / num_epochs)
        for rows in latents.batches(256, epoch=epoch):
            z1 = torch.from_numpy(rows.sample(epoch=epoch)[rows.valid]).flatten(1)
            z0, t = torch.randn_like(z1), torch.rand(len(z1), 1)  # noise is at t = 0
            loss = (network(torch.cat([(1 - t) * z0 + t * z1, t], 1)) - (z1 - z0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}", flush=True)
    return network


@torch.inference_mode()
def draw(latents: LatentDataset, network: nn.Module, model_path: str, picture: str) -> None:
    """Follow the velocity from noise by Euler's method, undo the normalisation, decode."""
    z = torch.randn(ROWS * COLUMNS, latents[0].mu.size)
    for t in torch.arange(NUM_STEPS) / NUM_STEPS:
        z += network(torch.cat([z, t.expand(len(z), 1)], dim=1)) / NUM_STEPS
    print(f"new latents: mean {z.mean():.3f}, std {z.std():.3f}; those of the export 0 and 1")
    z[:COLUMNS] = torch.from_numpy(latents[:COLUMNS].mu).flatten(1)
    z = z.reshape(-1, *latents.latent_shape).movedim(1, -1)  # statistics are per channel
    std, mean = (torch.tensor(latents.statistics[f"latents_{name}"]) for name in ("std", "mean"))
    model = from_pretrained(model_path)
    decoded = model((z * std + mean).movedim(-1, 1), mode="decode").decoded
    x = nn.functional.pad(model.config.likelihood.mean(decoded), (1, 1, 1, 1), value=0.5)
    grid = x.unflatten(0, (ROWS, COLUMNS)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray((255 * grid.clamp(0, 1)).byte().squeeze(2).numpy()).save(picture)


if __name__ == "__main__":
    torch.manual_seed(0)
    dataset = LatentDataset(sys.argv[2], normalized=True)
    draw(dataset, train(dataset, int(sys.argv[4])), sys.argv[1], sys.argv[3])
