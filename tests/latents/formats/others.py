"""Read a tar and a Parquet file with the libraries that people use, and print what they see.

`python others.py TAR PARQUET` -> JSON: reader -> list of samples. A process of its own, since
`datasets` reads its offline switch and its cache directory when it is imported.
"""

import json
import sys

import datasets
import numpy as np
import pyarrow.parquet as pq
import webdataset as wds

FIELDS = ("mu", "logvar", "mu_hflip", "logvar_hflip")


def with_webdataset(tar: str) -> list[dict]:
    samples = wds.WebDataset(tar, shardshuffle=False, empty_check=False).decode()
    return [
        {
            "key": sample["__key__"],
            **{name: sample[f"{name}.npy"].tolist() for name in FIELDS if f"{name}.npy" in sample},
            "dtype": str(sample["mu.npy"].dtype),
            "label": sample.get("cls"),
            "metadata": sample.get("json"),
            "text": sample.get("txt"),
            "row": sample["row.json"]["row"],
            "valid": sample["row.json"]["valid"],
        }
        for sample in samples
    ]


def with_datasets_tar(tar: str) -> list[dict]:
    samples = datasets.load_dataset("webdataset", data_files=tar, split="train")
    return [
        {
            "key": sample["__key__"],
            **{n: np.asarray(sample[f"{n}.npy"]).tolist() for n in FIELDS if f"{n}.npy" in sample},
            "label": sample.get("cls"),
            "metadata": sample.get("json"),
            "text": sample.get("txt"),
            **sample["row.json"],
        }
        for sample in samples
    ]


def with_datasets_parquet(parquet: str) -> list[dict]:
    samples = datasets.load_dataset("parquet", data_files=parquet, split="train")
    numpy = samples.with_format("numpy")
    return [
        {
            **{name: numpy[i][name].tolist() for name in FIELDS if name in samples.features},
            "dtype": samples.features["mu"].__repr__(),
            **{name: samples[i][name] for name in samples.features if name not in FIELDS},
        }
        for i in range(len(samples))
    ]


def with_pyarrow(parquet: str) -> list[dict]:
    with pq.ParquetFile(parquet) as file:
        return file.read().to_pylist()


if __name__ == "__main__":
    tar, parquet = sys.argv[1:]
    found = {
        "webdataset": with_webdataset(tar),
        "datasets tar": with_datasets_tar(tar),
        "datasets parquet": with_datasets_parquet(parquet),
        "pyarrow": with_pyarrow(parquet),
    }
    print(json.dumps(found, default=repr))  # webdataset leaves an empty member as b""
