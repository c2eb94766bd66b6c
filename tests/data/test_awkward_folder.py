"""A folder of awkward files goes the whole way: pack, index, verify, train, export, other readers.

What went in, what did not and why is one table: each file is a sample with its own bytes, or listed
as broken, or counted. AWKWARD_COUNT=2000 makes 2,000 pictures.
"""

import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from pipeline.__main__ import main
from pipeline.data.index import Index
from pipeline.latents import LatentDataset
from pipeline.train import main as train
from tests.data.awkward_folders import PACKED, FolderTruth, write_folder
from tests.export.world import make_config, run_export

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow

SEED = int(os.environ.get("AWKWARD_SEED", "0"))
COUNT = int(os.environ.get("AWKWARD_COUNT", "200"))
CONFIG = """
batch_size: 16
num_steps: 6
model: {backbone: {kind: mlp, hidden: [16]}, bottleneck: {kind: gaussian, size: 4}}
objective: {regularisers: [{kind: kl}]}
monitor: {wandb: {mode: disabled}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FolderTruth]:
    """A packed folder, and the truth about it."""
    root = tmp_path_factory.mktemp("awkward")
    print("seed", SEED, "pictures", COUNT)
    truth = write_folder(root / "photos", SEED, COUNT)
    assert (
        main(["pack", str(root / "photos"), str(root / "data"), "--leave-out", "--workers=1"]) == 0
    )
    return root, truth


def by_webdataset(shards: Iterable[Path]) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset leaves its files to the collector
        return list(wds.WebDataset([str(path) for path in shards], shardshuffle=False))


def keys_of(index: Index) -> set[str]:
    return set().union(*(index.table(number).keys() for number in range(len(index.shards))))


def raw(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def sources(truth: FolderTruth) -> dict[bytes, bytes]:
    return {raw(path): image.content for path, image in truth.samples.items()}


def origin(key: str, suffix: str, truth: FolderTruth) -> bytes:
    """The path of the file that a sample was made of, by its key."""
    name = unquote_to_bytes(key)
    shown = {raw(path): path for path in truth.samples}
    for candidate in (name, *(name + b"." + s.encode() for s in (suffix, suffix.upper()))):
        if candidate in shown:
            return candidate
    raise AssertionError(key)


def test_each_file_is_a_sample_or_listed_or_counted(world: tuple[Path, FolderTruth]):
    root, truth = world
    found: dict[bytes, bytes] = {}
    index = Index.open(root / "data")
    for number, shard in enumerate(index.shards):
        data = (root / "data" / shard.name).read_bytes()
        for sample in index.table(number).samples():
            suffix = next(name for name in sample.members if name not in ("cls", "json"))
            at, size = sample.members[suffix]
            path = origin(sample.key, suffix, truth)
            assert path not in found
            found[path] = data[at : at + size]
    assert found == sources(truth)
    lines = (root / "data" / "broken.jsonl").read_text().splitlines()
    assert len(lines) == len(truth.broken) > 0
    assert index.left_out_lines() == []
    num_files = sum(len(files) for _, _, files in os.walk(root / "photos"))
    assert truth.num_files == num_files


def test_others_read_one_sample_per_file(world: tuple[Path, FolderTruth]):
    root, truth = world
    shards = sorted((root / "data").glob("*.tar"))
    pictures = Counter(image.content for image in truth.samples.values())
    read = Counter(
        content
        for sample in by_webdataset(shards)
        for name, content in sample.items()
        if name in PACKED
    )
    assert read == pictures
    by_tarfile: Counter[bytes] = Counter()
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if not member.name.endswith((".cls", ".json")):
                    by_tarfile[file.read()] += 1
    assert by_tarfile == pictures


def test_the_whole_way(world: tuple[Path, FolderTruth], capsys: pytest.CaptureFixture[str]):
    root, truth = world
    assert main(["verify", str(root / "data"), "--decode"]) == 0
    (root / "run.yaml").write_text(CONFIG)
    data = [f"run_dir={root}/run", f"data.path={root}/data", "data.decode.size=16"]
    assert train([str(root / "run.yaml"), *data]) == 0
    assert not (root / "run" / "quarantine.jsonl").exists()
    out = root / "export"
    formats = [{"kind": "parquet"}, {"kind": "tar"}, {"kind": "npy"}]
    assert run_export(make_config(root / "run", out, formats=formats)) == 0
    assert main(["verify", str(out), "--source", str(root / "data")]) == 0
    latents = LatentDataset(out)
    assert len(latents) == len(truth.samples)
    assert np.isfinite(latents[:].mu).all()
    keys = keys_of(Index.open(root / "data"))
    tables = [pq.read_table(path) for path in sorted((out / "data" / "parquet").iterdir())]
    assert {key for table in tables for key in table["key"].to_pylist()} == keys
    rows = datasets.load_dataset(
        "parquet",
        data_files=str(out / "data/parquet/*.parquet"),
        split="train",
        cache_dir=str(root / "cache"),
    )
    assert set(rows["key"]) == keys
    assert {sample["__key__"] for sample in by_webdataset((out / "data" / "tar").iterdir())} == keys
    capsys.readouterr()
    print(table(truth, len(latents)))


def table(truth: FolderTruth, num_rows: int) -> str:
    """What went in, what did not, and why."""
    reasons = Counter("damaged" if "link" not in why else why for why in truth.broken.values())
    counts = {"files": truth.num_files, "samples": len(truth.samples), "rows of latents": num_rows}
    counts |= {f"listed in broken.jsonl: {why}": n for why, n in reasons.items()}
    counts |= {f"counted: {kind}": n for kind, n in sorted(truth.ignored.items())}
    return "\n".join(f"{count:6,}  {name}" for name, count in counts.items())
