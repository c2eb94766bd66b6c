"""Shards written by others: the same keys and bytes as `wds.WebDataset` yields, in the same order.

GNU tar in every format, webdataset's own ShardWriter, and the layout that img2dataset leaves.
"""

import json
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from pipeline.data.decode import ImageDecode
from pipeline.data.index import Index, build_index
from pipeline.data.index.verify import verify_shards
from pipeline.data.ordered_shards import OrderedShards
from pipeline.data.settings import DataConfig
from pipeline.data.storage import open_storage
from tests.data.streams import members_of
from tests.shards import open_stream, png, tiny_image

Samples = list[tuple[str, dict[str, bytes]]]
SIZE = 16
LONG = f"{'folder' * 12}/{'deeper' * 12}"  # 146 characters: too long for a header's name field
FORMATS = ("ustar", "gnu", "oldgnu", "pax", "v7")


def raw(sample: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    members = {name: data for name, data in sample.items() if not name.startswith("__")}
    return sample["__key__"], members


def theirs(folder: Path) -> Samples:
    """What webdataset reads, undecoded."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset leaves its files to the collector
        return [raw(sample) for sample in wds.WebDataset(urls, shardshuffle=False)]


def ours(index: Index, folder: Path) -> Samples:
    """What our index says, read range by range."""
    storage = open_storage(folder)
    found: Samples = []
    for number, shard in enumerate(index.shards):
        for sample in index.table(number).samples():
            members = {
                suffix: storage.read(shard.name, offset, size)
                for suffix, (offset, size) in sample.members.items()
            }
            found.append((sample.key, members))
    storage.close()
    return found


def check_all_ways(folder: Path, out: Path) -> Samples:
    """Index, verify, stream of raw samples and stream of images: all agree with webdataset."""
    expected = theirs(folder)
    assert expected
    index = build_index(folder, out=out, deep=True)
    assert index.damage == []
    assert ours(index, folder) == expected
    assert verify_shards(out, shards=folder).problems == []

    ordered = OrderedShards(folder, index=out, batch_size=1, epochs=1)
    by_key = sorted(expected, key=lambda sample: sample[0])
    assert sorted((raw(sample) for sample in ordered), key=lambda sample: sample[0]) == by_key

    decode = ImageDecode(size=SIZE)
    images: dict[str, bytes] = {}
    data = DataConfig(path=str(out), shards=str(folder), split="all", decode=decode, lanes=1)
    with open_stream(data, index=index, seed=0, batch_size=1, num_steps=len(expected)) as stream:
        for batch in stream:
            if batch.weight[0] == 1:
                images[batch.keys[0]] = batch.x[0].permute(1, 2, 0).contiguous().numpy().tobytes()
    for key, members in expected:
        content = next((members[name] for name in decode.suffixes if name in members), None)
        if content is None:  # no image by webdataset's rule, such as the `left.right.png` of `z`
            assert key not in images
            continue
        wanted = np.empty((SIZE, SIZE, 3), np.uint8)
        decode.decode(content, wanted)
        assert images.pop(key) == wanted.tobytes()
    assert images == {}
    return expected


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files as people have them: folders, dots, capitals, files that belong to no sample."""
    root = tmp_path / "tree"
    names = [
        "a",
        "b.c",
        "sub/x",
        "sub/x-1",
        "sub.dir/y",
        "sub.dir/z.left.right",
        "ümlaut/日本",
        "UPPER",
    ]
    for number, name in enumerate(names):
        path = root / f"{name}.PNG" if name == "UPPER" else root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(tiny_image(number, 24)))
        path.with_name(f"{Path(name).name}.json").write_text(json.dumps({"name": name}))
    (root / "b.c.seg.png").write_bytes(png(tiny_image(90)))
    (root / "README").write_text("no dot, no sample")
    (root / "empty").mkdir()
    (root / "sub" / "link.txt").symlink_to("x.json")
    return root


def run_tar(root: Path, file: Path, dialect: str, *names: str) -> None:
    program = shutil.which("tar")
    if program is None:
        pytest.skip("GNU tar is not installed")
    if (
        "GNU tar"
        not in subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    ):
        pytest.skip("this tar is not GNU tar")
    argv = [program, "--sort=name", f"--format={dialect}", "-C", root, "-cf", file, *names]
    subprocess.run(argv, check=True)


@pytest.mark.parametrize("dialect", FORMATS)
def test_gnu_tar_in_every_format(tree: Path, tmp_path: Path, dialect: str):
    shards = tmp_path / "shards"
    shards.mkdir()
    top = sorted(path.name for path in tree.iterdir() if path.name not in ("b.c.seg.png",))
    run_tar(tree, shards / "a.tar", dialect, ".")
    run_tar(tree, shards / "b.tar", dialect, *top)
    expected = check_all_ways(shards, tmp_path / "index")
    keys = [key for key, _ in expected]
    assert "./sub/x" in keys
    assert "sub/x" in keys
    assert "ümlaut/日本" in keys
    assert dict(expected)["b"].keys() >= {"c.png", "c.json"}  # the key ends at the first dot
    assert "png" in dict(expected)["UPPER"]


@pytest.mark.parametrize("dialect", ["gnu", "oldgnu", "pax", "ustar"])
def test_gnu_tar_with_long_names(tmp_path: Path, dialect: str):
    root, shards = tmp_path / "tree", tmp_path / "shards"
    shards.mkdir()
    # ustar has 155 bytes for folders and 100 for a name; the others have no bound.
    longest = 95 if dialect == "ustar" else 200
    for number, stem in enumerate(["short", "n" * 90, "n" * longest, "m" * 96, "é" * 40]):
        path = root / LONG / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(tiny_image(number, 20)))
        path.with_suffix(".txt").write_text(stem)
    run_tar(root, shards / "a.tar", dialect, "folder" * 12)
    expected = check_all_ways(shards, tmp_path / "index")
    assert len(expected) == 5
    assert f"{LONG}/{'n' * longest}" in dict(expected)


def test_names_of_exactly_one_hundred_bytes(tmp_path: Path):
    for dialect in FORMATS[:4]:
        root, shards = tmp_path / dialect, tmp_path / f"{dialect}-shards"
        root.mkdir()
        shards.mkdir()
        for number, stem in enumerate(["x" * 95, "x" * 96, "y" * 94 + "é"]):
            (root / f"{stem}.png").write_bytes(png(tiny_image(number, 20)))
        run_tar(root, shards / "a.tar", dialect, *sorted(p.name for p in root.iterdir()))
        assert len(check_all_ways(shards, tmp_path / f"{dialect}-index")) == 3


@pytest.mark.parametrize("options", [{}, {"mtime": 1.25}, {"mtime": 0}], ids=str)
def test_webdatasets_shard_writer(tmp_path: Path, options: dict[str, float]):
    """Its default time is a float, which takes a PAX header before every member."""
    folder = tmp_path / "shards"
    folder.mkdir()
    pattern = str(folder / "w-%06d.tar")
    with wds.ShardWriter(pattern, maxcount=7, verbose=0, encoder=False, **options) as writer:
        for number in range(20):
            writer.write({"__key__": f"part/{number:05d}", **members_of(number)})
    data = (folder / "w-000000.tar").read_bytes()
    assert (b"PaxHeader" in data) == (options.get("mtime", 0.5) != 0)
    expected = check_all_ways(folder, tmp_path / "index")
    assert [key for key, _ in expected] == [f"part/{number:05d}" for number in range(20)]
    assert dict(expected)["part/00003"] == members_of(3)


def test_the_layout_of_img2dataset(tmp_path: Path):
    """jpg, txt and json per sample; a parquet table and a JSON of statistics beside each shard."""
    folder = tmp_path / "images"
    folder.mkdir()
    for shard in range(2):
        rows = []
        with wds.TarWriter(str(folder / f"{shard:05d}.tar"), encoder=False) as writer:
            for number in range(6):
                key = f"{shard:05d}{number:04d}"
                record = {"caption": f"caption {key}", "url": f"https://x/{key}.jpg", "key": key}
                image = members_of(3 * (6 * shard + number))["jpg"]
                text = record["caption"].encode()
                writer.write(
                    {"__key__": key, "jpg": image, "txt": text, "json": json.dumps(record).encode()}
                )
                rows.append(record)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text('{"count": 6}')
    expected = check_all_ways(folder, tmp_path / "index")
    assert len(expected) == 12
    assert expected[7][1].keys() == {"jpg", "txt", "json"}


def test_two_neighbours_with_one_key_are_one_sample_and_others_are_two(tmp_path: Path):
    """webdataset's rule: a sample is a run of members with one key."""
    folder = tmp_path / "s"
    folder.mkdir()
    with wds.TarWriter(str(folder / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "a", "png": png(tiny_image(0))})
        writer.write({"__key__": "a", "txt": b"joins the one before"})
        writer.write({"__key__": "b", "png": png(tiny_image(1))})
        writer.write({"__key__": "a", "png": png(tiny_image(2)), "txt": b"another one"})
    index = build_index(folder)
    assert ours(index, folder) == theirs(folder)
    assert [key for key, _ in ours(index, folder)] == ["a", "b", "a"]
    assert index.num_duplicate_keys == 1
    assert index.duplicate_keys == [["a", "a.tar", "a.tar"]]
    data = DataConfig(path=str(folder), split="all", decode=ImageDecode(size=8), lanes=1)
    with open_stream(data, index=index, seed=0, batch_size=1, num_steps=3) as stream:
        seen = [(batch.keys[0], int(batch.uid[0])) for batch in stream]
    assert sorted(seen) == [("a", 0), ("a", 2), ("b", 1)]  # training reads each of them
