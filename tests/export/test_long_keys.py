"""Keys longer than a ustar header holds, or not ASCII: in every format, by every reader."""

import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from pipeline.common.errors import DONE
from pipeline.export.verify.levels import verify_export
from pipeline.latents import LatentDataset
from pipeline.latents.formats import READERS
from tests.export.foreign import picture, write_shards
from tests.export.world import make_config, run_export

KEYS = (
    "a" * 90,  # fits, but with `.logvar.npy` no longer
    "b" * 120,
    "c" * 300,
    "あ" * 40 + "/" + "い" * 40,
    "folder/" * 20 + "d",  # fits into a ustar header, by its folders
    "folder/" * 50 + "e",
    "plain",
    "100%/ö ä",
)


@pytest.fixture(scope="module")
def out(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    members: dict[str, bytes] = {}
    for i, key in enumerate(KEYS):
        members |= {f"{key}.png": picture(i), f"{key}.txt": key.encode()}
    data = write_shards(folder / "data", {"0.tar": members})
    formats = [{"kind": kind} for kind in READERS]
    config = make_config(run_dir, folder / "out", formats=formats, data={"path": str(data)})
    assert run_export(config) == DONE
    assert verify_export(folder / "out", source=data).problems == []
    return folder / "out"


@pytest.mark.parametrize("kind", READERS)
def test_our_reader_has_them(out: Path, kind: str):
    ds = LatentDataset(out, format=kind)
    assert tuple(ds.column("key")) == tuple(ds.column("text")) == KEYS
    assert [ds.by_key(key).index for key in KEYS] == list(range(len(KEYS)))


@pytest.mark.filterwarnings("ignore:unclosed file")  # webdataset leaves its shards open
def test_tarfile_and_webdataset_have_them(out: Path):
    """A name gets a PAX header only where ustar does not hold it."""
    path = out / "data/tar/0.tar"
    with tarfile.open(path) as tar:
        names = tar.getnames()
        with_header = {member.name for member in tar if member.pax_headers}
    suffixes = ("logvar.npy", "mu.npy", "row.json", "txt")
    assert names == [f"{key}.{suffix}" for key in KEYS for suffix in suffixes]
    assert f"{KEYS[0]}.txt" not in with_header
    assert f"{KEYS[0]}.logvar.npy" in with_header
    assert not any(name.startswith(KEYS[4]) for name in with_header)
    samples = list(wds.WebDataset(str(path), shardshuffle=False, empty_check=False).decode())
    assert tuple(sample["__key__"] for sample in samples) == KEYS
    expected = LatentDataset(out)[:].mu
    np.testing.assert_array_equal(np.stack([sample["mu.npy"] for sample in samples]), expected)


def test_parquet_and_the_key_index_have_them(out: Path):
    for name in ("data/parquet/0.parquet", "data/npy/0.parquet"):
        assert tuple(pq.read_table(out / name)["key"].to_pylist()) == KEYS
    assert set(pq.read_table(out / "keys.parquet")["key"].to_pylist()) == set(KEYS)
