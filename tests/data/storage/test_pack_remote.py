"""Packing into S3: the same files as a local pack, also after it was stopped."""

import hashlib
from pathlib import Path

import boto3
import numpy as np
import pytest
from PIL import Image

from pipeline.common.errors import UserError
from pipeline.data.index import Index
from pipeline.data.index.verify import verify_shards
from pipeline.data.pack import shards
from pipeline.data.pack.pack import pack
from pipeline.data.pack.sources import Folder, Sprites
from pipeline.data.storage.opening import open_writable
from tests.data.storage.conftest import BUCKET

pytestmark = pytest.mark.slow


@pytest.fixture
def url(request: pytest.FixtureRequest, s3_endpoint: str) -> str:
    return f"s3://{BUCKET}/{request.node.name.translate({ord('['): '-', ord(']'): None})}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images, two of them broken, of which one is a shard of its own."""
    for number in range(5):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        if number in (1, 2):
            path.write_bytes(path.read_bytes()[:-30])
    return tmp_path / "images"


def in_s3(url: str) -> dict[str, str]:
    """Every object below the URL with its hash, but for the index: it holds S3's tags."""
    client, prefix = boto3.client("s3"), url.removeprefix(f"s3://{BUCKET}/") + "/"
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    names = [entry["Key"].removeprefix(prefix) for entry in listed]
    return {
        name: hashlib.sha256(
            client.get_object(Bucket=BUCKET, Key=prefix + name)["Body"].read()
        ).hexdigest()
        for name in names
        if not name.startswith("index/")
    }


def locally(root: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.iterdir()
        if path.is_file()
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder_in_s3_has_the_bytes_of_a_local_pack(
    folder: Path, tmp_path: Path, url: str, workers: int
):
    local = pack(Folder(source=folder, shard_samples=1), tmp_path / "out")
    remote = pack(Folder(source=folder, shard_samples=1), url, workers=workers)
    assert in_s3(url) == locally(tmp_path / "out")
    assert (remote.dataset_id, remote.classes) == (local.dataset_id, local.classes)
    assert (remote.broken, remote.num_shards) == (local.broken, 3)
    assert Index.open(url).has_checksums
    assert verify_shards(url, decode=True).problems == []
    assert pack(Folder(source=folder, shard_samples=1), url) == remote  # nothing is left to do
    with pytest.raises(UserError, match="another source or with other settings"):
        pack(Folder(source=folder, shard_samples=2), url)


def test_a_stopped_pack_goes_on(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    pack(Sprites(count=10, shard_samples=2), tmp_path / "out")
    write, written = shards.write_part, []

    def counted(*arguments: object) -> int:
        written.append(arguments[-1])
        return write(*arguments)

    monkeypatch.setattr(shards, "write_part", counted)
    store_type = type(open_writable(url))
    put = store_type.put

    def stop_before_a_record(self: object, name: str, content: bytes | Path) -> None:
        if name == "_stage/part-000002.json" and written.count(2) == 1:
            raise KeyboardInterrupt
        put(self, name, content)

    monkeypatch.setattr(store_type, "put", stop_before_a_record)
    with pytest.raises(KeyboardInterrupt):
        pack(Sprites(count=10, shard_samples=2), url)
    assert "pack.json" not in in_s3(url)
    pack(Sprites(count=10, shard_samples=2), url)
    assert written == [0, 1, 2, 2, 3, 4]
    assert in_s3(url) == locally(tmp_path / "out")


def test_foreign_shards_are_refused(url: str):
    open_writable(url).put("other.tar", b"x")
    with pytest.raises(UserError, match=r"already holds shards .* other\.tar"):
        pack(Sprites(count=10), url)


def test_http_is_refused_before_anything_is_made():
    with pytest.raises(UserError, match="read only"):
        pack(Sprites(count=10), "http://127.0.0.1:9/x")
