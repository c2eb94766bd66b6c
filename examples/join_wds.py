"""Pictures beside their latents, by webdataset: the tars of an export follow those of its source.

latentmill export run tar run=runs/vae out=exports/vae-tar
python examples/join_wds.py exports/vae-tar data/sprites

Both have the same shards, and these the same keys in the same order (an export takes all splits
by default), so that one is read beside the other, and nothing is looked up.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import webdataset as wds
from torch.utils.data import DataLoader

IMAGE = "png;jpg;jpeg;webp"


def open_pairs(export: str, shards: str) -> wds.DataPipeline:
    """Return an iterable of (key, picture [3, H, W] in [0, 1], mu [*latent], label)."""
    root = Path(export, "data/tar")
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.tar"))
    read = wds.tarfile_to_samples()  # as wds.WebDataset does, but of the shards that it is given

    def join(sources: Iterable[dict[str, str]]) -> Iterator[dict[str, object]]:
        for source in sources:
            pictures = read([{"url": str(Path(shards, source["url"]))}])
            latents = read([{"url": str(root / source["url"])}])
            for picture, latent in zip(pictures, latents, strict=True):
                assert picture["__key__"] == latent["__key__"], f"{source}: keys differ"
                if json.loads(latent["row.json"])["valid"]:  # else the picture cannot be decoded
                    mu = latent["mu.npy" if "mu.npy" in latent else "z.npy"]
                    yield picture | {"mu.npy": mu, "cls": latent.get("cls", b"-1")}

    return wds.DataPipeline(
        wds.SimpleShardList(names),
        wds.split_by_worker,  # a loader's workers take turns at the shards
        join,
        wds.decode("torchrgb"),
        wds.to_tuple("__key__", IMAGE, "mu.npy", "cls"),
    )


def main(export: str, shards: str) -> None:
    """Read all pairs with two workers."""
    num_pairs = 0
    for key, picture, mu, label in DataLoader(open_pairs(export, shards), None, num_workers=2):
        if num_pairs == 0:
            print(f"{key}: picture {tuple(picture.shape)}, mu {tuple(mu.shape)}, label {label}")
        num_pairs += 1
    print(f"{num_pairs} pairs")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("export")
    parser.add_argument("shards")
    main(**vars(parser.parse_args()))
