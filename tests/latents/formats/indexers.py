"""Read folders of matrices with the libraries that build indices, and print what they see.

`python indexers.py READER FOLDER` -> JSON: rows in the reader's order. A process of its own:
libraries that bring their own OpenMP do not share one with torch.
"""

import json
import sys
from pathlib import Path

import numpy as np

COLUMNS = ["key", "row", "valid", "label", "metadata"]


def with_embedding_reader(folder: str) -> list[dict]:
    from embedding_reader import EmbeddingReader

    reader = EmbeddingReader(
        embeddings_folder=folder,
        metadata_folder=folder,
        meta_columns=COLUMNS,
        file_format="parquet_npy",
    )
    return [
        {"mu": mu.tolist(), **dict(zip(COLUMNS, notes, strict=True))}
        for matrix, table in reader(batch_size=5, show_progress=False)
        for mu, notes in zip(matrix, table[COLUMNS].values.tolist(), strict=True)
    ]


def with_faiss(folder: str) -> list[dict]:
    """Each vector's nearest neighbour in an index of all of them."""
    import faiss

    paths = sorted(Path(folder).rglob("*.npy"))
    matrix = np.concatenate([np.load(path, mmap_mode="r") for path in paths]).astype(np.float32)
    index = faiss.IndexFlatL2(matrix.shape[1])
    index.add(matrix)
    distances, neighbours = index.search(matrix, 2)
    return [
        {"distances": pair.tolist(), "neighbours": two.tolist()}
        for pair, two in zip(distances, neighbours, strict=True)
    ]


READERS = {"embedding_reader": with_embedding_reader, "faiss": with_faiss}

if __name__ == "__main__":
    name, folder = sys.argv[1:]
    print(json.dumps(READERS[name](folder)))
