"""An export as a Hugging Face data set: shapes restored, mapped, split, and batched for torch.

latentmill export run parquet run=runs/vae out=exports/vae
python examples/huggingface.py exports/vae
"""

import argparse
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch.utils.data import DataLoader


def load(export: str) -> datasets.Dataset:
    """Return the rows that could be encoded, with a normalised latent beside each mean."""
    files = f"{export}/data/parquet/**/*.parquet"
    rows = datasets.load_dataset("parquet", data_files=files, split="train")
    stats = json.loads(Path(export, "latent_stats.json").read_text())
    field = "mu" if "mu" in rows.features else "z"
    mean, std = (np.array(stats[f"latents_{name}"], np.float32) for name in ("mean", "std"))

    def normalise(batch: dict[str, Any]) -> dict[str, Any]:
        mu = np.moveaxis(batch[field], 1, -1)  # channels last, as the statistics are per channel
        label = np.nan_to_num(np.array(batch["label"], np.float64), nan=-1)  # null: it has none
        return {"latent": np.moveaxis((mu - mean) / std, -1, 1), "label": label.astype(np.int64)}

    rows = rows.filter(lambda valid: valid, input_columns="valid")
    features = datasets.Features(rows.features | {"latent": rows.features[field]})
    return rows.with_format("numpy").map(normalise, batched=True, features=features)


def main(export: str) -> None:
    """Print the features, and a batch of each part."""
    rows = load(export)
    for name, feature in rows.features.items():
        print(f"{name}: {feature}")
    for name, part in rows.train_test_split(test_size=0.1, seed=0).items():
        columns = part.with_format("torch", columns=["latent", "label"])
        batch = next(iter(DataLoader(columns, batch_size=32, shuffle=name == "train")))
        latent, label = batch["latent"], batch["label"]
        print(f"{name}: {len(part)} rows, latents {tuple(latent.shape)}, labels {label.dtype}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("export")
    main(parser.parse_args().export)
