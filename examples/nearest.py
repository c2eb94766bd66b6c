"""Nearest neighbours in an export, by a faiss index over its matrices.

latentmill export run npy run=runs/vae out=exports/vae-npy
python examples/nearest.py exports/vae-npy

Prints the recall of the index beside brute force, and the keys of a few neighbours.
"""

import argparse
import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

NUM_NEIGHBOURS = 10


def read_matrices(export: str) -> tuple[NDArray[np.float32], NDArray[np.object_]]:
    """Return the vectors [rows, elements] and keys [rows] of all rows that could be encoded."""
    vectors, keys = [], []
    for path in sorted(Path(export, "data/npy").rglob("*.npy")):
        twin = pq.read_table(path.with_suffix(".parquet"), columns=["key", "valid"])
        valid = twin["valid"].to_numpy()
        vectors.append(np.load(path, mmap_mode="r")[valid].astype(np.float32))
        keys.append(twin["key"].to_numpy()[valid])
    if not vectors:
        sys.exit(f"{export} holds no .npy files: export with the config npy, as above")
    return np.concatenate(vectors), np.concatenate(keys)


def recall(found: NDArray[np.int64], nearest: NDArray[np.int64]) -> float:
    """Return the share of the true neighbours [queries, k] that are among the found ones."""
    return float(np.mean([np.isin(t, f).mean() for t, f in zip(nearest, found, strict=True)]))


def main(export: str) -> None:
    """Index all rows but every twentieth, and ask for the neighbours of those."""
    vectors, keys = read_matrices(export)
    asked = np.arange(len(vectors)) % 20 == 0
    queries, indexed, indexed_keys = vectors[asked], vectors[~asked], keys[~asked]
    index = faiss.IndexHNSWFlat(vectors.shape[1], 32)  # 32 links per vector; distances are squared
    index.hnsw.efConstruction, index.hnsw.efSearch = 100, 64
    index.add(indexed)
    exact = faiss.IndexFlatL2(vectors.shape[1])
    exact.add(indexed)
    _, found = index.search(queries, NUM_NEIGHBOURS)
    _, nearest = exact.search(queries, NUM_NEIGHBOURS)
    print(f"{index.ntotal} vectors of {index.d} numbers, {len(queries)} queries")
    print(f"recall@{NUM_NEIGHBOURS}: {recall(found, nearest):.3f}")
    for key, row in zip(keys[asked][:5], found, strict=False):
        print(f"{key}: {', '.join(indexed_keys[row[:3]])}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("export")
    main(parser.parse_args().export)
