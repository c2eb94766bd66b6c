"""New pictures, one row per class below a row of the export's own, by a rectified flow of latents.

latentmill export run parquet run=runs/vae out=exports/vae
python examples/latent_flow.py runs/vae exports/vae flow.png 50    # epochs
"""

import argparse

import torch
from PIL import Image
from torch import nn

import latentmill as lm

ROWS, COLUMNS, NUM_STEPS, WIDTH = 4, 12, 100, 1024
FREQUENCIES = torch.pi * torch.arange(16)  # the time t is seen as its cosines


def train(latents: lm.LatentDataset, classes: torch.Tensor, num_epochs: int) -> nn.Module:
    """Fit the velocity of lines from noise z0 to latents z1: E |v(z, t, class) - (z1 - z0)|^2."""
    size = latents[0][latents.fields[0]].size
    layers = [nn.Linear(size + len(FREQUENCIES) + classes.shape[1], WIDTH), nn.SiLU()]
    layers += [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.SiLU())]
    network = nn.Sequential(*layers, nn.Linear(WIDTH, size))
    optimizer = torch.optim.AdamW(network.parameters())
    for epoch in range(num_epochs):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - epoch / num_epochs)
        for rows in latents.batches(256, epoch=epoch):
            z1 = torch.from_numpy(rows.sample(epoch=epoch)[rows.valid]).flatten(1)
            z0, t = torch.randn_like(z1), torch.rand(len(z1), 1)  # noise is at t = 0
            known = (1 - t) * z0 + t * z1, (t * FREQUENCIES).cos(), classes[rows.labels[rows.valid]]
            with torch.autocast("cpu", torch.bfloat16):
                loss = (network(torch.cat(known, dim=1)) - (z1 - z0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}", flush=True)
    return network


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, kind in (("model", str), ("export", str), ("picture", str), ("epochs", int)):
        parser.add_argument(name, type=kind)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    latents = lm.LatentDataset(arguments.export, normalized=True)
    classes = torch.eye(int(latents.column("label").max()) + 2)[:, :-1]  # the last: of NO_LABEL
    network = train(latents, classes, arguments.epochs).requires_grad_(False)
    z = torch.randn(ROWS * COLUMNS, latents[0][latents.fields[0]].size)
    labels = (torch.arange(len(z)) // COLUMNS - 1) % max(len(classes) - 1, 1)
    for t in torch.arange(NUM_STEPS) / NUM_STEPS:  # Euler's method
        known = z, (t * FREQUENCIES).cos().expand(len(z), -1), classes[labels]
        z += network(torch.cat(known, dim=1)) / NUM_STEPS
    z[:COLUMNS] = torch.from_numpy(latents[:COLUMNS].latents[latents.fields[0]]).flatten(1)
    z = latents.denormalize(z.unflatten(1, latents.latent_shape).numpy())
    x = lm.load(arguments.model).decode(z)
    x = nn.functional.pad(nn.functional.interpolate(x, scale_factor=2), (2, 2, 2, 2), value=0.5)
    grid = x.unflatten(0, (ROWS, COLUMNS)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray((255 * grid).byte().squeeze(2).numpy()).save(arguments.picture, optimize=True)
