"""Read an export in every way, then print which of the heavy packages were imported on the way."""

import sys

from pipeline.latents import LatentDataset

out, key = sys.argv[1:]
for kind in ("npy", "safetensors", "parquet", "tar"):
    ds = LatentDataset(out, format=kind, normalized=True)
    assert ds[5].key == ds[5:6].keys[0]
    assert ds.by_key(key).key == key
    assert len(ds.column("label")) == len(ds)
    assert sum(int(batch.weight.sum()) for batch in ds.batches(8, world=2)) > 0
    assert ds[:].sample().shape == (len(ds), *ds.latent_shape)
heavy = ("torch", "accelerate", "deepspeed", "wandb", "webdataset", "transformers", "datasets")
print(len(ds), [name for name in heavy if name in sys.modules])
